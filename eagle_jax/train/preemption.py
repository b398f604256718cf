"""Lets a run save its step and stop on SIGTERM (from a scheduler) or Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

from eagle_jax import interrupts


class Preemption:
    """Catches the first SIGTERM or SIGINT in a `with` block; a second one acts as usual.

    With several processes, JAX's runtime catches SIGTERM and makes all processes agree on a step;
    Ctrl-C is passed on to it as SIGTERM. Outside the main thread no signal is caught.

    Attributes:
        signal: number of the signal caught, or 0.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Preemption:
        # With several processes a handler for SIGTERM would replace that of JAX's runtime.
        wanted = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else (signal.SIGINT,)
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._hear) for number in wanted}
            interrupts.watch.allow_one()
        return self

    def __exit__(self, *_: object) -> None:
        if self._handlers:  # no signal was caught
            interrupts.watch.disallow()
        self._restore()

    def _restore(self) -> None:
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def _hear(self, number: int, _: object) -> None:
        if number != signal.SIGINT:  # the next Ctrl-C is the second signal
            interrupts.watch.disallow()
        self._restore()
        name = signal.Signals(number).name
        # os.write, because the handler may have interrupted a print.
        os.write(2, f"\n{name}: saving after this step; once more ends at once\n".encode())
        if jax.process_count() == 1:
            self.signal = number
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    def reached(self, step: int) -> bool:
        """Returns whether to stop after `step`.

        All processes must call it at each step; then all get the same answer.
        """
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.signal = signal.SIGTERM
        return self.signal != 0
