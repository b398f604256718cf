"""Reports a run: trace file, TensorBoard events, progress bar, loss curve, throughput.

The trace, `metrics.jsonl`, has one line per step and one per validation. It holds only computed
values, so two runs can be compared with `cmp`; timings go to the TensorBoard events.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eagle_jax import outputs

TRACE, EVENTS, CURVE = "metrics.jsonl", "events", "loss.png"


class Stopwatch:
    """Measures training time without compilation, validation and checkpoints."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.steps = 0
        self._since: float | None = None
        self._at = 0

    def start(self, step: int) -> None:
        """Starts timing, with `step` steps finished; has no effect on a running watch."""
        if self._since is None:
            self._since, self._at = time.perf_counter(), step

    def stop(self, step: int) -> None:
        """Stops timing, with `step` steps finished; has no effect on a stopped watch."""
        if self._since is not None:
            self.seconds += time.perf_counter() - self._since
            self.steps += step - self._at
            self._since = None

    def lap(self, step: int) -> float | None:
        """Returns steps per second so far, or None before any step; the watch may be running."""
        seconds, steps = self.seconds, self.steps
        if self._since is not None:
            seconds += time.perf_counter() - self._since
            steps += step - self._at
        return steps / seconds if steps and seconds else None


class Trace:
    """Appends to `metrics.jsonl`; first removes lines after `step`, where the run resumes."""

    def __init__(self, path: Path, step: int) -> None:
        kept = [json.dumps(line) + "\n" for line in read_trace(path) if line["step"] <= step]
        fresh = path.with_suffix(".tmp")
        outputs.write_text(fresh, "".join(kept))
        fresh.replace(path)
        self._path, self._file = path, path.open("a", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        with outputs.naming(self._path):
            self._file.write(json.dumps(line) + "\n")

    def sync(self) -> None:
        """Flushes everything to the disk: a checkpoint must not be ahead of its trace."""
        with outputs.naming(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with outputs.naming(self._path):
            self._file.close()


def read_trace(path: Path) -> list[dict[str, Any]]:
    """Returns a trace's lines up to the first damaged one; a missing file has none."""
    lines: list[dict[str, Any]] = []
    if not path.is_file():
        return lines
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            break
        if not _is_line(line):
            break
        lines.append(line)
    return lines


def _is_line(line: Any) -> bool:
    """Returns whether `line` is one that `Report` writes: a step's loss, or a validation's."""
    if not isinstance(line, dict) or type(line.get("step")) is not int:
        return False
    values = line.get("validation", line)
    return isinstance(values, dict) and isinstance(values.get("loss"), int | float)


class Report:
    """Writes trace, events and progress bar of one run.

    Args:
        directory: the run's `output_dir`.
        start, steps: the step where this start begins (its checkpoint's), and the last step.
        step_tokens: tokens of one step, padding included.
        step_flops: model FLOPs of one step divided by the peak FLOP/s of all devices, in seconds;
            None if the peak is unknown.
        speaks: whether this process writes and shows anything; only the first process does.
    """

    def __init__(
        self,
        directory: Path,
        start: int,
        steps: int,
        step_tokens: int,
        step_flops: float | None,
        *,
        speaks: bool = True,
    ) -> None:
        import tensorboardX
        from tqdm import tqdm

        self.directory = directory
        self.watch = Stopwatch()
        self._step_tokens, self._step_flops = step_tokens, step_flops
        self.last: dict[str, Any] = {}
        self.last_validation: dict[str, Any] = {}
        self.losses: list[float] = []  # losses of the steps up to `start`
        for line in read_trace(directory / TRACE):  # the trace of the run that is resumed
            if line["step"] > start:
                break
            if "validation" in line:
                self.last_validation = line["validation"]
            else:
                self.last = line
                self.losses.append(line["loss"])
        self._trace = Trace(directory / TRACE, start) if speaks else None
        self._events = (
            tensorboardX.SummaryWriter(str(directory / EVENTS), purge_step=start + 1)
            if speaks
            else None
        )
        pace = 0.5 if sys.stderr.isatty() else 15.0
        quiet = start >= steps or not speaks
        self._bar = tqdm(total=steps, initial=start, unit="step", mininterval=pace, disable=quiet)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Records one finished step."""
        self.last = dict(values)
        self._write({"step": step, **values})
        self._write_events("train", step, {**values, **self.rates(step)})
        self._bar.update(1)
        self._bar.set_postfix(self._short(values) | self._short(self.rates(step)), refresh=False)

    def validation(self, step: int, values: Mapping[str, float]) -> None:
        """Records one validation."""
        self.last_validation = dict(values)
        self._write({"step": step, "validation": dict(values)})
        self._write_events("validation", step, values)
        shown = "  ".join(f"{name} {text}" for name, text in self._short(values).items())
        if self._trace is not None:
            self._bar.write(f"step {step}  validation: {shown}", file=sys.stderr)

    def rates(self, step: int) -> dict[str, float]:
        """Returns tokens per second and, where the peak is known, MFU."""
        pace = self.watch.lap(step)
        if pace is None:
            return {}
        rates = {"tokens_per_second": pace * self._step_tokens}
        return rates if self._step_flops is None else rates | {"mfu": pace * self._step_flops}

    def sync(self) -> None:
        """Flushes the trace to the disk."""
        if self._trace is not None:
            self._trace.sync()

    def close(self) -> None:
        self._bar.close()
        if self._trace is not None and self._events is not None:
            self._trace.close()
            self._events.close()

    def _write(self, line: dict[str, Any]) -> None:
        if self._trace is not None:
            self._trace.write(line)

    def _write_events(self, group: str, step: int, values: Mapping[str, float]) -> None:
        if self._events is None:
            return
        for name, value in values.items():
            self._events.add_scalar(f"{group}/{name}", value, step)

    @staticmethod
    def _short(values: Mapping[str, float]) -> dict[str, str]:
        named = {"loss": "loss", "top1": "top1", "top3": "top3", "mfu": "mfu"}
        short = {shown: f"{values[name]:.3f}" for name, shown in named.items() if name in values}
        if "tokens_per_second" in values:
            short["tok/s"] = f"{values['tokens_per_second']:.3g}"
        return short


def plot(trace: Path, image: Path) -> None:
    """Plots losses and accuracies of training (raw and smoothed) and validation over steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    lines = read_trace(trace)
    training = [line for line in lines if "validation" not in line]
    validation = [{"step": x["step"], **x["validation"]} for x in lines if "validation" in x]
    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    _curves(losses, training, validation, ("loss",))
    _curves(accuracies, training, validation, ("top1", "top3"))
    losses.set(title="loss", xlabel="step", ylabel="loss")
    accuracies.set(title="accuracy", xlabel="step", ylabel="share of assistant tokens")
    with outputs.naming(image):
        figure.savefig(image, dpi=120)


def _curves(
    axes: Any, training: list[dict], validation: list[dict], names: tuple[str, ...]
) -> None:
    for index, name in enumerate(names):
        color = f"C{index}"
        rows = [line for line in training if name in line]
        if not rows:
            continue
        steps, values = [x["step"] for x in rows], [x[name] for x in rows]
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        axes.plot(steps, _smooth(values), color=color, label=f"{name}, training")
        if validation:
            axes.plot(
                [x["step"] for x in validation],
                [x[name] for x in validation],
                "o--",
                color=color,
                markersize=3,
                label=f"{name}, validation",
            )
    axes.grid(alpha=0.3)
    if names and axes.get_legend_handles_labels()[0]:
        axes.legend()


def _smooth(values: list[float]) -> list[float]:
    """Returns a bias-corrected exponential mean over about a hundredth of the curve."""
    keep = 1.0 - 1.0 / max(10.0, len(values) / 100)
    total = weight = 0.0
    smooth = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1.0
        smooth.append(total / weight)
    return smooth
