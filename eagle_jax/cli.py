"""What all commands share: their parser, one line for a user's mistake, Ctrl-C, warnings."""

from __future__ import annotations

import _thread
import argparse
import contextlib
import difflib
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from eagle_jax import interrupts, progress

USER_ERROR = 2
INTERRUPTED = interrupts.STATUS


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are one line, `error: ...`, with the closest option's name."""

    def error(self, message: str) -> NoReturn:
        found = re.match(r"unrecognized arguments: (-\S+)", message)
        if found:
            names = [name for action in self._actions for name in action.option_strings]
            given = found[1].split("=")[0]
            close = difflib.get_close_matches(given, names, n=1)
            message = f"unknown option {given}" + (f"; did you mean {close[0]}?" if close else "")
        elif message.startswith("unrecognized arguments: "):
            message += "; put quotes around a text of several words"
        self.exit(USER_ERROR, f"error: {message} ({self.prog} --help explains)\n")


def run(main: Callable[[], int | None]) -> NoReturn:
    """Runs a program's `main` and exits with its status.

    `ValueError` and `OSError` become `error: ...` on stderr with status 2, a warning to the user
    becomes `warning: ...`. Ctrl-C gives status 130 within two seconds, whatever the program does.
    With EAGLE_JAX_DEBUG=1 errors keep their traceback.
    """
    watch = interrupts.watch
    progress.show(True)
    with watch.watching(), _quiet_hooks():
        try:
            status = main()
            sys.stdout.flush()
        except SystemExit:
            raise
        except BaseException as error:
            told = isinstance(error, ValueError | OSError | KeyboardInterrupt)
            # The thread that hears the signal may need a moment to say so.
            stopped = watch.interrupted(1.0 if _from_ctrl_c(error) else 0.0)
            if os.environ.get("EAGLE_JAX_DEBUG") == "1" or not (told or stopped):
                raise
            if stopped:  # whatever the error, it is a consequence
                interrupts.end()
            status = _report(error)
    sys.exit(status)


def _from_ctrl_c(error: BaseException | None) -> bool:
    """Whether the error is a KeyboardInterrupt, or was raised while one was handled."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


@contextlib.contextmanager
def _quiet_hooks() -> Iterator[None]:
    """Shows a warning to the user as one line, without a place in our code.

    No Ctrl-C is lost that comes inside a callback of the garbage collector, where Python cannot
    raise it.
    """
    before, unraisable = warnings.showwarning, sys.unraisablehook

    def ignore(hook: Any) -> None:
        if hook.exc_type is not KeyboardInterrupt:
            unraisable(hook)
        else:  # raised again, a moment later, where it is not swallowed
            threading.Timer(0.01, _thread.interrupt_main).start()

    def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
        if category is UserWarning:
            print(f"warning: {message}", file=sys.stderr)
        else:
            before(message, category, *where, **more)

    warnings.showwarning, sys.unraisablehook = show, ignore
    try:
        yield
    finally:
        warnings.showwarning, sys.unraisablehook = before, unraisable


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
