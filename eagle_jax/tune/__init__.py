"""Finds the fastest method for a model on this machine: `python -m eagle_jax.tune`.

The result is stored beside the model (`eagle_jax.decode.tuning_store`), where `method="auto"` finds
it. First `measure` times the target's pass and records which nodes of wide trees are accepted. From
these records `acceptance` and `predict` estimate the speed of every method in a grid. Finally
`measure` compares the most promising methods of each family with vanilla decoding.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

import eagle_jax
from eagle_jax.decode import tuning_store
from eagle_jax.decode.method_cli import label, spell
from eagle_jax.params import Params
from eagle_jax.tune import measure, predict

__all__ = ["Tuning", "tune"]

_CALIBRATION = 6  # units for measuring acceptance, and for the heats
_PASSES = 3  # units for timing the target's pass


@dataclasses.dataclass(frozen=True)
class Tuning:
    """The result of tuning at one temperature.

    Attributes:
        temperature: 0 is greedy.
        passes: seconds of the target's pass, by number of tokens.
        heats, final: methods compared with vanilla on a few units and on all, fastest first.
        vanilla: tokens per second of vanilla decoding in the final.
        best: the fastest method that is significantly faster than vanilla; None if there is none.
        entry: the entry for the tuning store.
    """

    temperature: float
    passes: dict[int, float]
    heats: list[measure.Measured]
    final: list[measure.Measured]
    vanilla: float
    best: measure.Measured | None
    entry: tuning_store.Entry


def tune(
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    temperatures: Sequence[float] = (0.0, 1.0),
    batch_size: int = 1,
    new_tokens: int = 96,
    quiet: bool = False,
) -> Iterator[Tuning]:
    """Finds the fastest method at each temperature; stores nothing.

    Args:
        params: from `eagle_jax.load`.
        prompts: token ids of each prompt; only prompts of the most common padded size are used.
        temperatures: at most one above 0, because one stored entry serves all of them.
        batch_size: number of prompts decoded together.
        new_tokens: tokens of the longest answer.
        quiet: whether to hide progress bars.

    Yields:
        The result at each temperature, as soon as it is known.

    Raises:
        ValueError: an argument is invalid; the message is one line.
    """
    _check(params, temperatures, batch_size, new_tokens)
    units = measure.units(params, prompts, batch_size, new_tokens)
    bench = measure.Bench(params, units, new_tokens, quiet)
    return _tune(bench, temperatures)


def _tune(bench: measure.Bench, temperatures: Sequence[float]) -> Iterator[Tuning]:
    units, steps = bench.units, None
    passes = measure.pass_times(bench, units[:_PASSES])
    # Greedy decoding comes first, because it also measures the time of a draft's steps.
    for temperature in sorted({0.0, *temperatures}):
        evidence = measure.calibrate(bench, units[:_CALIBRATION], passes, temperature, steps)
        steps = evidence.steps
        if temperature not in temperatures:
            continue
        predictions = [predict.predict(m, evidence) for m in predict.candidates(evidence)]
        chosen = predict.finalists(predictions)
        heats, final, base = measure.compete(bench, chosen, temperature, _CALIBRATION)
        vanilla = sum(run.tokens for run in base) / sum(run.seconds for run in base)
        best = measure.choose(final)
        entry = _entry(bench, temperature, passes, heats, final, best)
        yield Tuning(temperature, passes, heats, final, vanilla, best, entry)


def _check(params: Params, temperatures: Sequence[float], rows: int, new_tokens: int) -> None:
    for name, value in (("batch_size", rows), ("new_tokens", new_tokens)):
        if value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")
    if not temperatures or not all(0 <= t < float("inf") for t in temperatures):
        raise ValueError(f"temperature={list(temperatures)}: give numbers of 0 or more")
    if len({t for t in temperatures if t > 0}) > 1:
        raise ValueError(
            f"temperature={list(temperatures)}: one entry serves every temperature above 0; give "
            "one of them"
        )
    context = params.target_config.max_position_embeddings
    if new_tokens >= context:
        raise ValueError(f"new_tokens={new_tokens}: the context is {context}; use less")


def _entry(
    bench: measure.Bench,
    temperature: float,
    passes: dict[int, float],
    heats: Sequence[measure.Measured],
    final: Sequence[measure.Measured],
    best: measure.Measured | None,
) -> tuning_store.Entry:
    rows = len(bench.units[0].prompts)
    return {
        "key": tuning_store.key(bench.params, rows, temperature),
        "method": "--method vanilla" if best is None else spell(best.prediction.method),
        "speedup": 1.0 if best is None else best.speedup,
        "interval": None if best is None else best.interval,
        "temperature": temperature,
        "tuned": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "jax": version("jax"),
        "eagle_jax": eagle_jax.__version__,
        "new_tokens": bench.new_tokens,
        "prompts": rows * len(bench.units),
        "pass_ms": {str(size): 1e3 * seconds for size, seconds in passes.items()},
        "heats": [row(m) for m in heats],
        "final": [row(m) for m in final],
    }


def row(measured: measure.Measured) -> dict[str, Any]:
    """Returns a method's predicted and measured figures as a dictionary."""
    prediction = measured.prediction
    return {
        "name": label(prediction.method),
        "method": spell(prediction.method),
        "predicted_tau": prediction.tau,
        "predicted_tokens_per_second": prediction.tokens_per_second,
        "tau": measured.tau,
        "tokens_per_second": measured.tokens_per_second,
        "speedup": measured.speedup,
        "interval": measured.interval,
        "total": measured.total,
        "total_interval": measured.total_interval,
    }
