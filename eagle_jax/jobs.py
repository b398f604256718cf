"""Runs other programs of this project as subprocesses, one after the other or concurrently."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

Job = tuple[Path, list[str]]
"""The file for a program's stderr if programs run at once, and its arguments after `python`."""


def run(*jobs: Job, together: bool = False) -> None:
    """Prints and runs programs, one after the other, or all at once if `together`.

    Programs that run at once share the device, and each one's stderr goes to its job's file.
    SIGTERM is forwarded to running programs, which save first; call this from the main thread.

    Raises:
        SystemExit: a program failed, with its status. No further program is started, and those
            that ran at the same time have ended.
    """
    # By default each process reserves most of the device's memory when it starts.
    shared = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ} if together else None

    with _forwarding() as running, ThreadPoolExecutor(max(1, len(jobs))) as pool:

        def status(job: Job) -> int:
            log, words = job
            print("$", *words, f"2> {log}" if together else "", flush=True)
            with log.open("wb") if together else contextlib.nullcontext() as errors:
                process = subprocess.Popen([sys.executable, *words], stderr=errors, env=shared)
                running.append(process)
                return process.wait()

        for (log, _), code in zip(jobs, (pool.map if together else map)(status, jobs), strict=True):
            if code and together:
                print(f"{log}: status {code}; the file says why", file=sys.stderr)
            if code:
                raise SystemExit(code if code > 0 else 128 - code)


@contextlib.contextmanager
def _forwarding() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Yields a list; SIGTERM to this process is forwarded to the processes in it."""
    running: list[subprocess.Popen[bytes]] = []

    def forward(number: int, frame: object) -> None:
        del frame
        for process in running:
            process.send_signal(number)

    before = signal.signal(signal.SIGTERM, forward)
    try:
        yield running
    finally:
        signal.signal(signal.SIGTERM, before)
