"""Stopping in time: SIGTERM (a scheduler takes the machine back) or Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

from eagle_jax import interrupts


class Preemption:
    """Hears SIGTERM and SIGINT between `with` and its end; a second one acts as it always does.

    With several processes JAX's own runtime hears SIGTERM and has all of them agree on a step. A
    Ctrl-C is passed on to it. Entered outside the main thread it hears nothing.

    Attributes:
        signal: number of the signal heard, 0 for none.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Preemption:
        # A handler for SIGTERM would take the place of the runtime's.
        wanted = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else (signal.SIGINT,)
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._hear) for number in wanted}
            interrupts.watch.allow_one()
        return self

    def __exit__(self, *_: object) -> None:
        if self._handlers:  # nothing was heard
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
        # Not print: the handler may have interrupted one.
        os.write(2, f"\n{name}: saving after this step; once more ends at once\n".encode())
        if jax.process_count() == 1:
            self.signal = number
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    def reached(self, step: int) -> bool:
        """Whether to stop after `step`: the same answer in every process, if all ask each step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.signal = signal.SIGTERM
        return self.signal != 0
