"""Figures against direct computations."""

import math
import statistics

import numpy as np
import pytest

from eagle_jax.decode import Vanilla
from eagle_jax.decode.acceptance import Rejection, Typical
from eagle_jax.evaluate import metrics, runner


class LawOnly(Vanilla):
    rule = Rejection()


class Lossy(Vanilla):
    rule = Typical()


@pytest.mark.parametrize("units", [3, 8])
def test_intervals_against_a_direct_computation(units) -> None:
    """Catches a weighted median off by one, and turns drawn without their question."""
    rng = np.random.default_rng(5)
    values = rng.uniform(1, 2, (units, 4))
    clusters = [f"q{i // 2}" for i in range(units)]
    weights = metrics.resample(clusters, 60)
    assert weights is not None and weights.shape == (60, units)
    own = len(set(clusters))
    counts = np.random.default_rng(0).multinomial(own, [1 / own] * own, size=60)
    medians, totals = [], []
    for row in counts:
        drawn = [values[i] for i in range(units) for _ in range(row[i // 2])]
        medians.append(statistics.median((a / b) / (c / d) for a, b, c, d in drawn))
        a, b, c, d = (math.fsum(unit[i] for unit in drawn) for i in range(4))
        totals.append((a / b) / (c / d))
    for statistic, direct in ((metrics.median_ratio, medians), (metrics.total_ratio, totals)):
        np.testing.assert_allclose(statistic(values, weights), direct)
        _, found = metrics.estimate(statistic, values, weights)
        assert found == pytest.approx([np.percentile(direct, 2.5), np.percentile(direct, 97.5)])
    point, _ = metrics.estimate(metrics.median_ratio, values, weights)
    assert point == pytest.approx(statistics.median((a / b) / (c / d) for a, b, c, d in values))


def test_one_question_has_no_interval() -> None:
    """Catches an interval of width zero that looks like certainty."""
    assert metrics.resample(["a", "a"]) is None
    assert metrics.estimate(metrics.total_ratio, np.ones((2, 4)), None) == (1.0, None)


def test_speedup_is_per_token() -> None:
    """Catches a lossy method that looks fast because its answers are short."""
    values = np.array([[10.0, 100.0, 5.0, 50.0]])  # half the time for half the tokens
    ones = np.ones((1, 1), int)
    assert metrics.median_ratio(values, ones) == metrics.total_ratio(values, ones) == 1.0


@pytest.mark.parametrize(
    ("tokens", "position"),
    [([1, 2, 3], None), ([1, 9, 3], 1), ([1, 2], 2), ([1, 2, 3, 4], 3), ([], 0)],
)
def test_first_difference(tokens, position) -> None:
    """Catches answers taken for equal because one is the other's beginning."""
    assert metrics.divergence(tokens, [1, 2, 3]) == position


def test_a_unit_over_repeats_and_padding() -> None:
    """Catches means for medians, padding rows counted, and one repeat that differs forgotten."""
    unit = runner.Unit("t", "", ("a", "b"), 0, 0.0, ((1,) * 4, (1,) * 2), (0, 1))
    runs = [
        {"new_tokens": [6, 4, 6], "rounds": [3, 2, 3], "accepted": [0.5, 0.25], "prefill": 1.0,
         "decode": seconds, "tokens": [[1] * 6, last]}
        for seconds, last in ((2.0, [5] * 4), (9.0, [5, 5, 6, 5]), (3.0, [5, 6, 5, 5]))
    ]  # fmt: skip
    found = metrics.measured(unit, runs, [[1] * 6, [5] * 4], kv=10)
    assert (found.decode, found.total, found.passes) == (3.0, 4.0, 3.0)
    assert (found.tokens, found.kept, found.rounds) == (16, 10, 5)
    assert found.accepted == (2.5, 1.25)
    assert (found.equal, found.divergence) == ((True, False), (1,))
    assert found.read == 10 * ((4 + 3) + (2 + 2) + (4 + 3))


@pytest.mark.parametrize(
    ("method", "temperature", "said"),
    [
        (Vanilla(), 1.0, "exact"),
        (LawOnly(), 1.0, "law only"),
        (Lossy(), 1.0, "lossy"),
        (LawOnly(), 0.0, "exact"),
        (Lossy(), 0.0, "exact"),
    ],
)
def test_what_is_promised(method, temperature, said) -> None:
    """Catches rejection sampling counted as a failure, and greedy decoding that is not checked."""
    assert metrics.guarantee(method, temperature) == said
