"""Stops a run whose training diverges: its loss is not finite, or jumps."""

from __future__ import annotations

import collections
import json
import math
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax

from eagle_jax.config import TrainConfig
from eagle_jax.train import data

BATCH = "diverged.jsonl"
_WINDOW, _TRUSTED_FROM = 100, 20  # steps in the median, and the fewest that are enough for it
_SHOWN = 8  # row numbers shown in an error


class Guard:
    """Checks the loss and the gradient norm of every step.

    Args:
        config: the run's configuration.
        directory: the run's `output_dir`; the text of the batch that diverged is written there.
        losses: losses of the steps before this start, so that a resumed run has the same medians.
    """

    def __init__(self, config: TrainConfig, directory: Path, losses: Iterable[float]) -> None:
        self._config, self._directory = config, directory
        self._losses = collections.deque(losses, maxlen=_WINDOW)

    def check(self, step: int, values: Mapping[str, float]) -> None:
        """Raises ValueError if training diverged at `step`; the error names the batch's rows."""
        for name in ("loss", "gradient_norm"):
            if not math.isfinite(values[name]):
                raise ValueError(
                    f"{name}={values[name]} at step {step}: training diverged {self._rows(step)}; "
                    "start again with --restart and a lower optim.learning_rate, or set "
                    "optim.clip_norm"
                )
        factor, loss = self._config.stop_on_spike, values["loss"]
        if factor and len(self._losses) >= _TRUSTED_FROM:
            median = statistics.median(self._losses)
            if loss > factor * median:
                raise ValueError(
                    f"loss={loss:.4g} at step {step}: above stop_on_spike={factor:g} times the "
                    f"median {median:.4g} of the last {len(self._losses)} {self._rows(step)}; "
                    "raise stop_on_spike and start again to go on from the last checkpoint, or "
                    "use --restart with a lower optim.learning_rate"
                )
        self._losses.append(loss)

    def _rows(self, step: int) -> str:
        rows = data.step_rows(self._config.data, step)
        shown = ", ".join(map(str, rows[:_SHOWN])) + (", ..." if len(rows) > _SHOWN else "")
        file = self._directory / BATCH
        if jax.process_index() == 0:
            lines = map(json.dumps, data.texts(self._config.data, rows))
            file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return f"on rows {shown} of data.train (their text: {file})"
