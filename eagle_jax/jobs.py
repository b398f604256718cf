"""Programs that run others of this project: in turn, or at once on one device."""

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
"""Where a program's progress goes if others run beside it; its arguments after `python`."""


def run(*jobs: Job, together: bool = False) -> None:
    """Runs programs, echoed: in turn, or at once, what they say to stderr in the files named.

    SIGTERM reaches those that run, which save first; call it from the main thread.

    Raises:
        SystemExit: one failed, with its status; no other is begun, and those beside it have ended.
    """
    # Alone a process takes most of the device's memory when it starts.
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
    """Processes that get the SIGTERM that this one gets."""
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
