"""Computes figures from samples: acceptance, speedups with intervals, bandwidth, equality.

Times are medians over the repeats of one prompt. A speedup is reported in two ways: as the median
over prompts of (vanilla's seconds per token / the method's), and as the same ratio of totals. Both
are given for decoding alone and including prefill. If both methods emit the same tokens, this
ratio equals the ratio of seconds. Intervals are 95 % bootstrap percentiles over questions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from eagle_jax.decode import method_cli
from eagle_jax.decode.method import Method
from eagle_jax.evaluate.config import BASELINE
from eagle_jax.evaluate.runner import Job, Unit
from eagle_jax.evaluate.samples import Samples
from eagle_jax.hardware import peak_bandwidth
from eagle_jax.params import Params
from eagle_jax.types import ParamDict

ALL = "all tasks"
RESAMPLES = 1000

# Columns: vanilla's seconds and tokens, the method's seconds and tokens.
Values = Float[np.ndarray, "units 4"]
Weights = Int[np.ndarray, "r units"]


def weight_bytes(params: ParamDict) -> int:
    """Returns the bytes of weights that one pass reads.

    An embedding table does not count, because a pass reads few of its rows. A tied table counts,
    because it is also the output head.
    """
    table = "embed_tokens.embedding"
    skipped = table if "lm_head.kernel" in params else None
    return sum(array.nbytes for name, array in params.items() if name != skipped)


def kv_bytes(params: Params) -> int:
    """Returns the bytes of the target's keys and values for one token."""
    config = params.target_config
    width = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return width * params.dtype.itemsize


def bandwidth_share(read: float, seconds: float, peak: float | None) -> float | None:
    """Returns MBU: bytes read divided by what the peak bandwidth allows; None if unknown."""
    return None if peak is None else read / seconds / peak


# --- One method on one unit --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Measured:
    """Figures of a method on a unit, over its repeats.

    Attributes:
        decode, total: median seconds, without and with prefill.
        tokens: committed tokens of all rows; padding rows count, because they are decoded too.
        passes: rounds of the slowest row, which all rows wait for.
        kept, rounds: committed tokens and rounds of the real rows.
        accepted: drafted tokens committed at each depth, per repeat.
        equal: whether each row's tokens equal vanilla's in every repeat.
        divergence: the first position that differs, for each row that differs.
        read: mean bytes of keys and values that a pass reads, over all rows.
    """

    decode: float
    total: float
    tokens: float
    passes: float
    kept: float
    rounds: float
    accepted: tuple[float, ...]
    equal: tuple[bool, ...]
    divergence: tuple[int, ...]
    read: float


def measured(
    unit: Unit, runs: Sequence[Mapping[str, Any]], truth: Sequence[Sequence[int]], kv: int
) -> Measured:
    """Returns the figures of a unit's repeats.

    `truth` holds vanilla's tokens of each row, and `kv` is the bytes of one token's KV cache.
    """
    rows = len(unit.ids)
    firsts = [
        min((divergence(run["tokens"][row], truth[row]) for run in runs), key=_last_is_equal)
        for row in range(rows)
    ]
    first = runs[0]["new_tokens"]
    lengths = [len(prompt) for prompt in unit.prompts]
    lengths += lengths[:1] * (len(first) - rows)
    return Measured(
        decode=_median(run["decode"] for run in runs),
        total=_median(run["prefill"] + run["decode"] for run in runs),
        tokens=_median(sum(run["new_tokens"]) for run in runs),
        passes=_median(max(run["rounds"]) for run in runs),
        kept=_median(sum(run["new_tokens"][:rows]) for run in runs),
        rounds=_median(sum(run["rounds"][:rows]) for run in runs),
        # A batch reports acceptance over all its rows, padding included; it is used for real rows.
        accepted=tuple(
            float(np.mean([share * sum(run["rounds"][:rows]) for share, run in pairs]))
            for pairs in _by_depth(runs)
        ),
        equal=tuple(position is None for position in firsts),
        divergence=tuple(position for position in firsts if position is not None),
        read=kv * sum(n + new / 2 for n, new in zip(lengths, first, strict=True)),
    )


def divergence(tokens: Sequence[int], truth: Sequence[int]) -> int | None:
    """Returns the first position where two answers differ (or one ends), or None if equal."""
    for position, (a, b) in enumerate(zip(tokens, truth, strict=False)):
        if a != b:
            return position
    return None if len(tokens) == len(truth) else min(len(tokens), len(truth))


def _last_is_equal(position: int | None) -> float:
    return float("inf") if position is None else position


def _by_depth(runs: Sequence[Mapping[str, Any]]) -> list[list[tuple[float, Mapping[str, Any]]]]:
    depths = range(len(runs[0]["accepted"]))
    return [[(run["accepted"][depth], run) for run in runs] for depth in depths]


def _median(values: Any) -> float:
    return float(np.median(list(values)))


# --- Intervals ---------------------------------------------------------------------------------


def resample(clusters: Sequence[str], resamples: int = RESAMPLES) -> Weights | None:
    """Returns each unit's count in each bootstrap sample, or None with fewer than 2 clusters.

    Whole clusters are drawn, because the turns of one question are not independent.
    """
    names, own = np.unique(np.array(clusters), return_inverse=True)
    if len(names) < 2:
        return None
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    return drawn[:, own]


def median_ratio(values: Values, weights: Weights) -> Float[np.ndarray, " r"]:
    """Returns, for each weighting, the median of (column 0 / column 1) / (column 2 / column 3)."""
    ratios = values[:, 0] * values[:, 3] / (values[:, 1] * values[:, 2])
    order = np.argsort(ratios, kind="stable")
    below = np.cumsum(weights[:, order], axis=1)
    half = below[:, -1:] / 2
    # With an even number of units, the median is the mean of the two middle ones.
    low, high = np.argmax(below >= half, axis=1), np.argmax(below > half, axis=1)
    return (ratios[order][low] + ratios[order][high]) / 2


def total_ratio(values: Values, weights: Weights) -> Float[np.ndarray, " r"]:
    """Returns, for each weighting, the same ratio as `median_ratio` of the columns' sums."""
    total = weights @ values
    return total[:, 0] * total[:, 3] / (total[:, 1] * total[:, 2])


def estimate(
    statistic: Callable[[Values, Weights], np.ndarray], values: Values, weights: Weights | None
) -> tuple[float, list[float] | None]:
    """Returns the statistic of the units, and its 95 % percentile interval over `weights`."""
    own = float(statistic(values, np.ones((1, len(values)), np.int64))[0])
    if weights is None:
        return own, None
    return own, np.percentile(statistic(values, weights), [2.5, 97.5]).tolist()


# --- Rows --------------------------------------------------------------------------------------


def guarantee(method: Method, temperature: float) -> str:
    """Returns "exact" (vanilla's tokens), "law only" (vanilla's distribution), or "lossy"."""
    if method.rule.seeded or temperature == 0:
        return "exact"
    return "law only" if method.rule.lossless else "lossy"


class Table:
    """Makes result rows over groups of units, as plain dictionaries."""

    def __init__(self, params: Params, device_kind: str) -> None:
        self.params = params
        self._methods: dict[tuple[str, float], Method] = {}
        self.peak, self.kv = peak_bandwidth(device_kind), kv_bytes(params)
        self._units: list[Unit] = []
        self._runs: dict[tuple[str, int], Measured] = {}
        self._compile: dict[str, float] = {}
        self._shapes: dict[tuple[str, int], str] = {}

    def read(self, groups: Sequence[Sequence[Job]], samples: Samples, repeats: int) -> None:
        """Reads the samples of each unit's methods."""
        for group in groups:
            runs = {job.name: [_sample(samples, job, i) for i in range(repeats)] for job in group}
            truth = runs[BASELINE][0]["tokens"]
            for job in group:
                at = job.name, len(self._units)
                self._methods[job.name, job.unit.temperature] = job.method
                self._runs[at] = measured(job.unit, runs[job.name], truth, self.kv)
                self._shapes[at] = job.shape()
                compiled = samples.get(job.shape())
                self._compile[job.shape()] = compiled["seconds"] if compiled else 0.0
            self._units.append(group[0].unit)

    def rows(self) -> list[dict[str, Any]]:
        """Returns a row per method, task and temperature, and per category if there are several."""
        tasks = list(dict.fromkeys(unit.task for unit in self._units))
        out = []
        for temperature in dict.fromkeys(unit.temperature for unit in self._units):
            for task in [*tasks, ALL] if len(tasks) > 1 else tasks:
                chosen = [
                    i
                    for i, unit in enumerate(self._units)
                    if unit.temperature == temperature and task in (unit.task, ALL)
                ]
                names = {self._units[i].category for i in chosen}
                split = sorted(names) if len(names) > 1 and task != ALL else []
                for category in ["", *filter(None, split)]:
                    own = [i for i in chosen if category in ("", self._units[i].category)]
                    out += [
                        {
                            "task": task,
                            "category": category,
                            "temperature": temperature,
                            "method": name,
                            **self._row(name, own, temperature),
                        }
                        for name, at in self._methods
                        if at == temperature
                    ]
        return out

    def _row(self, name: str, chosen: list[int], temperature: float) -> dict[str, Any]:
        method = self._methods[name, temperature]
        runs = [self._runs[name, i] for i in chosen]
        base = [self._runs[BASELINE, i] for i in chosen]
        rounds = sum(run.rounds for run in runs)
        accepted = np.sum([run.accepted for run in runs], axis=0)
        equal = [same for run in runs for same in run.equal]
        differing = [position for run in runs for position in run.divergence]
        passes, seconds = sum(run.passes for run in runs), sum(run.decode for run in runs)
        units = [self._units[i] for i in chosen]
        drawn = resample([f"{unit.task}/{','.join(unit.ids)}" for unit in units])
        shapes = {self._shapes[name, i] for i in chosen}
        return {
            "guarantee": guarantee(method, temperature),
            "answers": len(equal),
            "equal": sum(equal),
            "first_difference_median": _median(differing) if differing else None,
            "first_difference_min": min(differing) if differing else None,
            "tau": sum(run.kept for run in runs) / rounds,
            "accepted_per_depth": (accepted / rounds).tolist(),
            "accepted_per_drafted": (
                float(accepted.sum() / rounds / (method.nodes - 1)) if method.nodes > 1 else None
            ),
            "settings": method_cli.spell(method),
            "nodes": method.nodes,
            "round_ms": 1e3 * _median(run.decode / run.passes for run in runs),
            "round_cost": _median(
                run.decode / run.passes / (own.decode / own.passes)
                for run, own in zip(runs, base, strict=True)
            ),
            "tokens_per_second": sum(run.tokens for run in runs) / seconds,
            **_speedups("speedup", "decode", runs, base, drawn),
            **_speedups("end_to_end", "total", runs, base, drawn),
            "mbu": bandwidth_share(
                passes * self._weights(method) + sum(run.read * run.passes for run in runs),
                seconds,
                self.peak,
            ),
            "compile_seconds": sum(self._compile[shape] for shape in shapes),
        }

    def _weights(self, method: Method) -> int:
        """Returns the bytes of target and draft, counted once each: draft passes are unknown."""
        draft = None if method.draft is None else self.params.drafts[method.draft].params
        return weight_bytes(self.params.target) + (weight_bytes(draft) if draft else 0)


def _sample(samples: Samples, job: Job, repeat: int) -> dict[str, Any]:
    record = samples.get(job.key(repeat))
    assert record is not None
    return record


def _speedups(
    name: str,
    field: str,
    runs: Sequence[Measured],
    base: Sequence[Measured],
    drawn: Weights | None,
) -> dict[str, Any]:
    """Returns speedups over `base`, with intervals; `field` names the seconds to compare."""
    pairs = zip(base, runs, strict=True)
    values = np.array(
        [(getattr(a, field), a.tokens, getattr(b, field), b.tokens) for a, b in pairs]
    )
    median, median_interval = estimate(median_ratio, values, drawn)
    total, total_interval = estimate(total_ratio, values, drawn)
    return {
        name: median,
        f"{name}_interval": median_interval,
        f"{name}_total": total,
        f"{name}_total_interval": total_interval,
    }


def step_times(
    groups: Sequence[Sequence[Job]], samples: Samples, repeats: int
) -> list[dict[str, Any]]:
    """Returns milliseconds of a target pass by nodes: medians over repeats, then over prompts."""
    seconds: dict[int, list[float]] = {}
    for group in groups:
        for job in group:
            runs = [_sample(samples, job, i) for i in range(repeats)]
            seconds.setdefault(job.method.nodes, []).append(
                _median(run["decode"] / max(run["rounds"]) for run in runs)
            )
    return [{"nodes": nodes, "ms": 1e3 * _median(s)} for nodes, s in seconds.items()]
