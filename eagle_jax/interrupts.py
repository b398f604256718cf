"""Ends a command within two seconds of Ctrl-C and without a traceback, even while it compiles.

Python raises KeyboardInterrupt only when the main thread returns from C++, which takes half a
minute for some compilations, and leaving a thread pool waits for its threads. Therefore a command
has a watching thread: Python's signal handler writes to a pipe at once, the thread reads from it,
and it ends the process if the main thread has not done so after `GRACE` seconds.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import NoReturn

STATUS = 130  # 128 + SIGINT, as shells report it
GRACE = 1.5  # seconds that the main thread gets to clean up


def end_quietly() -> None:
    """Makes Ctrl-C end the process at once; used while modules are imported."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end_now)


def _end_now(number: int, frame: object) -> None:
    os._exit(STATUS)


def end() -> NoReturn:
    """Ends the process: kills its worker processes and does not wait for threads."""
    if multiprocessing := sys.modules.get("multiprocessing"):
        for child in multiprocessing.active_children():
            child.kill()
    if progress := sys.modules.get("eagle_jax.progress"):
        progress.erase()
    # In a thread, because the main thread may hold a stream's lock while it waits on a full pipe.
    flushing = threading.Thread(target=_flush, daemon=True)
    flushing.start()
    flushing.join(0.2)
    os._exit(STATUS)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


class Watch:
    """Counts Ctrl-C, and ends the process if the main thread does not react to one."""

    def __init__(self) -> None:
        self._interrupted = threading.Event()
        self._lock = threading.Lock()
        self._seen = 0
        self._allowed = 0
        self._announced = False  # read and written by the main thread only
        self._pipe: tuple[int, int] | None = None

    def interrupted(self, timeout: float = 0.0) -> bool:
        """Returns whether a Ctrl-C that `allow_one` did not announce arrives within `timeout` s."""
        return self._interrupted.wait(timeout)

    def allow_one(self) -> None:
        """Announces that the caller handles the next Ctrl-C itself."""
        with self._lock:
            self._allowed = self._seen + 1
        self._announced = True

    def disallow(self) -> None:
        """Revokes `allow_one`; call it if no Ctrl-C came."""
        with self._lock:
            self._allowed = min(self._allowed, self._seen)
        self._announced = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watches for Ctrl-C inside `with`.

        Does nothing outside the main thread, or if SIGINT is ignored or has another handler.
        """
        ours = (signal.default_int_handler, _end_now, self._raise)
        in_main = threading.current_thread() is threading.main_thread()
        if not in_main or signal.getsignal(signal.SIGINT) not in ours:
            yield
            return
        before = signal.set_wakeup_fd(self._open(), warn_on_full_buffer=False)
        signal.signal(signal.SIGINT, self._raise)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.set_wakeup_fd(before)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        """Raises KeyboardInterrupt, except inside an import, where the process ends at once.

        Modules written in C++ abort the process, or end in a traceback of their own, if an
        exception reaches them while they are imported.
        """
        announced, self._announced = self._announced, False
        if not announced and _importing(frame):
            end()
        raise KeyboardInterrupt

    def _open(self) -> int:
        """Returns the write end of the pipe; the first call starts the thread that reads."""
        if self._pipe is None:
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            # A forked worker gets the same Ctrl-C; through the same pipe it would count twice.
            os.register_at_fork(after_in_child=_forget_pipe)
            threading.Thread(target=self._read, name="ctrl-c", daemon=True).start()
        return self._pipe[1]

    def _read(self) -> None:
        assert self._pipe is not None
        while True:
            for number in os.read(self._pipe[0], 64):
                if number == signal.SIGINT and self._count():
                    time.sleep(GRACE)
                    end()

    def _count(self) -> bool:
        """Counts one Ctrl-C and returns whether it ends the process."""
        with self._lock:
            self._seen += 1
            if self._seen > self._allowed:
                self._interrupted.set()
            return self._interrupted.is_set()


def _importing(frame: FrameType | None) -> bool:
    """Returns whether a module is being imported at this point of the program."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _forget_pipe() -> None:
    with contextlib.suppress(ValueError):
        signal.set_wakeup_fd(-1)


watch = Watch()


@contextlib.contextmanager
def thread_pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Yields a pool of `threads` threads; after an error or Ctrl-C it does not wait for them."""
    pool = ThreadPoolExecutor(threads)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()
