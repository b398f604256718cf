"""What every `python -m eagle_jax...` shares: errors of the user are one line, not a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

USER_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def run(main: Callable[[], int | None]) -> NoReturn:
    """Runs a program's `main` and exits with its status.

    `ValueError` and `OSError` become `error: ...` on stderr with status 2, Ctrl-C status 130.
    With EAGLE_JAX_DEBUG=1 they keep their traceback.
    """
    try:
        status = main()
        sys.stdout.flush()
    except (ValueError, OSError, KeyboardInterrupt) as error:
        if os.environ.get("EAGLE_JAX_DEBUG") == "1":
            raise
        status = _report(error)
    sys.exit(status)


def _report(error: BaseException) -> int:
    """Tells the user, and returns the exit status."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):  # `| head` has read enough
        # Python flushes stdout once more at exit, which would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    print(f"error: {_message(error)}", file=sys.stderr)
    return USER_ERROR


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__
