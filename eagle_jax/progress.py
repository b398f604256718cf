"""Shows on a terminal that a compilation is running: `compiling eagle3 decode, 12 s`.

Only commands switch it on (`show`). Nothing is shown when eagle_jax is used as a library, from
other threads, or if standard error is not a terminal.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

_AFTER = 1.0  # seconds; loading a program from the compilation cache takes less

_shown = False
_line = threading.Lock()
_dirty = False


def show(on: bool) -> None:
    """Switches the progress line on (if standard error is a terminal) or off."""
    global _shown
    _shown = on and sys.stderr.isatty()


@contextlib.contextmanager
def compiling(what: Callable[[], str]) -> Iterator[None]:
    """Shows `compiling WHAT, N s` on standard error every second inside `with`, then erases it."""
    if not _shown or threading.current_thread() is not threading.main_thread():
        yield
        return
    done = threading.Event()
    thread = threading.Thread(target=_tick, args=(what(), done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(1.0)
        erase()


def _tick(what: str, done: threading.Event) -> None:
    global _dirty
    begin = time.monotonic()
    while not done.wait(_AFTER):
        with _line:
            if done.is_set():
                return
            _dirty = True
            sys.stderr.write(f"\r\x1b[Kcompiling {what}, {time.monotonic() - begin:.0f} s")
            sys.stderr.flush()


def erase() -> None:
    """Erases the progress line if it is shown."""
    global _dirty
    if _line.acquire(timeout=0.2):
        try:
            if _dirty:
                sys.stderr.write("\r\x1b[K")
                sys.stderr.flush()
            _dirty = False
        finally:
            _line.release()
