"""Shows a person at a terminal that a long compilation is one: `compiling eagle3 decode, 12 s`.

Only commands switch it on (`show`). In a library, in threads, in pipes and files nothing is shown.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

_AFTER = 1.0  # seconds; what is found compiled takes less

_shown = False
_line = threading.Lock()
_dirty = False


def show(on: bool) -> None:
    """Switches the line on, if standard error is a terminal, or off."""
    global _shown
    _shown = on and sys.stderr.isatty()


@contextlib.contextmanager
def compiling(what: Callable[[], str]) -> Iterator[None]:
    """Shows `compiling WHAT, N s` on standard error each second; erases it at the end."""
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
    """Erases the line if one is shown."""
    global _dirty
    if _line.acquire(timeout=0.2):
        try:
            if _dirty:
                sys.stderr.write("\r\x1b[K")
                sys.stderr.flush()
            _dirty = False
        finally:
            _line.release()
