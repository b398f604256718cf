"""Measures on the device: target passes, acceptance of wide trees, finalists against vanilla.

Methods take turns on every prompt, and their seconds are divided by vanilla's on the same prompt,
because other work on the machine slows all of them alike.
"""

from __future__ import annotations

import collections
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import as_completed
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from eagle_jax import interrupts, sharding
from eagle_jax.decode import Recycling, Vanilla, best_tree
from eagle_jax.decode.instrument import FixedTree, wide_pass
from eagle_jax.decode.method import Method
from eagle_jax.decode.methods import recycling
from eagle_jax.decode.program import bucket_prompt
from eagle_jax.decode.sampling import SamplingParams
from eagle_jax.decode.session import Session
from eagle_jax.drafters import DrafterSpec, registry
from eagle_jax.evaluate import metrics
from eagle_jax.params import Params
from eagle_jax.tune.acceptance import Copies, Record, Recorder
from eagle_jax.tune.drafts import DraftTuning
from eagle_jax.tune.predict import RECYCLING, Evidence, Prediction, Steps, Times

VANILLA = Vanilla()
SIZES = (1, 2, 4, 8, 16, 32, 64)
_STEP_TOKENS = 24  # rounds in a run that times the target's pass
_THREADS = 4  # programs compiled at the same time, as in eagle_jax.evaluate


@dataclasses.dataclass(frozen=True)
class Unit:
    """Prompts decoded together: token ids and seeds of each row."""

    prompts: tuple[tuple[int, ...], ...]
    seeds: tuple[int, ...]


def units(
    params: Params, prompts: Sequence[Sequence[int]], rows: int, new_tokens: int
) -> list[Unit]:
    """Groups the prompts of the most common padded size into units of `rows` prompts.

    One padded size needs few compiled programs.

    Raises:
        ValueError: there are fewer than two units, or no prompt leaves room for an answer.
    """
    room = params.target_config.max_position_embeddings - new_tokens
    fitting = [tuple(int(token) for token in prompt) for prompt in prompts if len(prompt) <= room]
    if not fitting:
        raise ValueError(
            f"new_tokens={new_tokens}: none of {len(prompts)} prompts leaves room for so many in "
            "the context; use less or shorter prompts"
        )
    sizes = collections.Counter(bucket_prompt(len(prompt)) for prompt in fitting)
    commonest = sizes.most_common(1)[0][0]
    fitting = [p for p in fitting if bucket_prompt(len(p)) == commonest]
    if len(fitting) < 2 * rows:
        raise ValueError(
            f"prompts: {len(fitting)} of one padded size ({commonest} tokens), an interval needs "
            f"twice batch_size={rows}; give more"
        )
    return [
        Unit(tuple(fitting[start : start + rows]), tuple(range(start, start + rows)))
        for start in range(0, len(fitting) - rows + 1, rows)
    ]


@dataclasses.dataclass(frozen=True)
class Run:
    """One run on a unit: decoding seconds, the slowest row's rounds, all rounds and answers."""

    seconds: float
    passes: int
    rounds: int
    answers: tuple[tuple[int, ...], ...]
    state: Any

    @property
    def tokens(self) -> int:
        return sum(map(len, self.answers))


@dataclasses.dataclass(frozen=True)
class Bench:
    """The setting of all runs: model, prompts, longest answer, and whether to hide the bar."""

    params: Params
    units: Sequence[Unit]
    new_tokens: int
    quiet: bool = False

    def run(self, method: Method, unit: Unit, temperature: float) -> Run:
        """Decodes a unit and returns what it took."""
        timed_pass = isinstance(method, FixedTree)
        new = min(_STEP_TOKENS, self.new_tokens) if timed_pass else self.new_tokens
        rows = [
            SamplingParams(temperature=temperature, ignore_eos=timed_pass, seed=seed)
            for seed in unit.seeds
        ]
        prompts = [list(prompt) for prompt in unit.prompts]
        session = Session(self.params, prompts, rows, method=method, max_new_tokens=new)
        session.run()
        rounds, state = session.statistics().rounds, session.state.method
        return Run(
            session.clock.decode,
            max(rounds),
            sum(rounds),
            tuple(tuple(answer.tolist()) for answer in session.answers()),
            jax.device_get(state) if isinstance(state, Record) else None,
        )

    def interleaved(
        self, methods: Sequence[Method], units: Sequence[Unit], temperature: float, what: str
    ) -> list[list[Run]]:
        """Compiles and warms up every method, then runs all in turn; returns [units][methods]."""
        threads = sharding.at_a_time(self.params.target, _THREADS)
        with interrupts.thread_pool(threads) as pool:
            runs = [pool.submit(self.run, m, units[0], temperature) for m in methods]
            for run in self.bar(as_completed(runs), len(runs), f"compiling, {what}"):
                run.result()
        out = []
        for unit in self.bar(units, len(units), what):
            out.append([self.run(method, unit, temperature) for method in methods])
        return out

    def bar(self, items: Any, total: int, what: str) -> Any:
        return tqdm(items, total=total, desc=what, file=sys.stderr, disable=self.quiet)


def pass_times(bench: Bench, units: Sequence[Unit]) -> dict[int, float]:
    """Returns the seconds of the target's greedy pass, by number of tokens (`SIZES`)."""
    methods: list[Method] = [VANILLA, *(wide_pass(size) for size in SIZES[1:])]
    runs = bench.interleaved(methods, units, 0.0, "target's pass")
    base = float(np.median([row[0].seconds / row[0].passes for row in runs]))
    times = {size: base * _relative(runs, i) for i, size in enumerate(SIZES)}
    # Times must not fall with more tokens; a smaller measured time is noise.
    largest = 0.0
    for size in SIZES:
        largest = times[size] = max(largest, times[size]) if size > 1 else times[size]
    return times


def _relative(runs: Sequence[Sequence[Run]], i: int) -> float:
    """Returns seconds per pass of method `i` divided by vanilla's (method 0), median over units."""
    own = [row[i].seconds / row[i].passes for row in runs]
    base = [row[0].seconds / row[0].passes for row in runs]
    return float(np.median(np.array(own) / np.array(base)))


def calibrate(
    bench: Bench,
    units: Sequence[Unit],
    passes: Mapping[int, float],
    temperature: float,
    steps: Mapping[str, Steps] | None = None,
) -> Evidence:
    """Measures acceptance at one temperature, and the cost of drafts unless `steps` gives it."""
    tuners, most = _tuners(bench.params), Times(passes).most()
    probes = {
        name: tuner.probe(bench.params.drafts[name].config if name != RECYCLING else None, most, n)
        for n in [bench.new_tokens]
        for name, tuner in tuners.items()
    }
    beside: dict[str, Method] = {}
    if steps is None:
        found = ((_beside(name), tuner.beside()) for name, tuner in tuners.items())
        beside = {name: method for name, method in found if method is not None}
    methods: dict[str, Method] = {"vanilla": VANILLA, **probes, **beside}
    what = f"acceptance at T={temperature:g}"
    runs = bench.interleaved(list(methods.values()), units, temperature, what)
    one = float(np.median([row[0].seconds / row[0].passes for row in runs]))
    seconds = {name: one * _relative(runs, i) for i, name in enumerate(methods)}
    # Rescale to the pass times, which were measured at another moment.
    scale = passes[1] / one if temperature == 0 else 1.0
    times = Times(passes, max(one - passes[1], 0.0) if temperature > 0 else 0.0)
    records = {
        name: [row[i].state for row in runs] for i, name in enumerate(methods) if name in probes
    }

    def drafting(name: str) -> float:
        """Returns the seconds of a round minus those of the target's pass."""
        return max(seconds[name] * scale - times.of(methods[name].nodes), 0.0)

    if steps is None:
        steps = {
            name: tuner.steps(
                probes[name],
                drafting(name),
                drafting(_beside(name)) if _beside(name) in beside else None,
            )
            for name, tuner in tuners.items()
        }
    texts = [
        (prompt, answer)
        for unit, row in zip(units, runs, strict=True)
        for prompt, answer in zip(unit.prompts, row[0].answers, strict=True)
    ]
    return Evidence(
        times,
        steps,
        {name: tuner.learn(records[name], probes[name]) for name, tuner in tuners.items()},
        texts,
        [Copies.of(prompt, answer, bench.new_tokens) for prompt, answer in texts],
    )


class _RecyclingTuning(DraftTuning):
    """Calibration of token recycling, which has no draft model."""

    def probe(self, config: Any, most: int, rounds: int) -> Method:
        del config
        tree = best_tree(recycling.ACCURACY, min(max(most - 1, 7), 60))
        return Recorder(Recycling(tree), rounds)


def _tuners(params: Params) -> dict[str, DraftTuning]:
    """Returns the tuners of the model's drafts, and that of recycling."""
    found = {kind: spec.tuner() for kind, spec in registry.specs().items() if kind in params.drafts}
    return found | {RECYCLING: _RecyclingTuning(DrafterSpec(RECYCLING, None, None))}


def _beside(name: str) -> str:
    """Returns the name of a draft's second run, which is only timed."""
    return f"{name} beside"


# --- Finalists ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Measured:
    """A method compared with vanilla.

    Attributes:
        prediction: its prediction.
        tau: acceptance length τ, tokens per round.
        tokens_per_second: over all its runs.
        speedup, interval: median over units of vanilla's seconds per token divided by its own.
        total, total_interval: the same ratio for the total seconds of all units.
    """

    prediction: Prediction
    tau: float
    tokens_per_second: float
    speedup: float
    interval: list[float] | None
    total: float
    total_interval: list[float] | None

    @property
    def sure(self) -> bool:
        """Whether it is significantly faster than vanilla, by the median and in total."""
        intervals = self.interval, self.total_interval
        return all(interval is not None and interval[0] > 1.0 for interval in intervals)


def summarise(prediction: Prediction, runs: Sequence[Run], base: Sequence[Run]) -> Measured:
    """Returns the figures of a method's runs against `base`, vanilla's runs of the same units."""
    pairs = zip(base, runs, strict=True)
    values = np.array([(a.seconds, a.tokens, b.seconds, b.tokens) for a, b in pairs], float)
    weights = metrics.resample([str(i) for i in range(len(values))])
    tokens, seconds = sum(run.tokens for run in runs), sum(run.seconds for run in runs)
    return Measured(
        prediction,
        tokens / max(sum(run.rounds for run in runs), 1),
        tokens / seconds,
        *metrics.estimate(metrics.median_ratio, values, weights),
        *metrics.estimate(metrics.total_ratio, values, weights),
    )


def choose(measured: Sequence[Measured]) -> Measured | None:
    """Returns the fastest method significantly faster than vanilla, or None if there is none."""
    return max((m for m in measured if m.sure), key=lambda m: m.speedup, default=None)


def compete(
    bench: Bench,
    predictions: Sequence[Prediction],
    temperature: float,
    heats: int = 6,
    last: int = 2,
) -> tuple[list[Measured], list[Measured], list[Run]]:
    """Runs heats of all methods on a few units, then a final of the `last` fastest on all units.

    Returns:
        Figures of the heats, figures of the final, and vanilla's runs in the final.
    """
    chosen, rounds, base = list(predictions), [], []
    for units, what in ((bench.units[:heats], "heats"), (bench.units, "final")):
        methods = [VANILLA, *(p.method for p in chosen)]
        runs = bench.interleaved(methods, units, temperature, f"{what} at T={temperature:g}")
        base, *others = ([row[i] for row in runs] for i in range(len(methods)))
        found = [summarise(p, own, base) for p, own in zip(chosen, others, strict=True)]
        found.sort(key=lambda m: -m.speedup)
        rounds.append(found)
        chosen = [m.prediction for m in found[:last]]
    return rounds[0], rounds[1], base
