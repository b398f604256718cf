"""Predicts tokens per second of any method from the times and acceptance of a few.

The time of a round is the target's pass over the tree's nodes, the draft's steps, and at
temperature > 0 the noise of every depth. A round commits τ tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eagle_jax.decode import Lookahead, PromptLookup, Recycling, Vanilla
from eagle_jax.decode.method import Method
from eagle_jax.drafters import registry
from eagle_jax.tune.acceptance import COPY, LONGEST_COPY, Copies, pooled

RECYCLING = "recycling"
"""The name of token recycling among the drafts: it is calibrated as a draft is, without one."""

# Rounds rarely commit many tokens, so a tree cannot pay off if its pass takes longer than this many
# passes over one token.
_WORTH = 3.0
_ALWAYS_TRIED = 4  # trees with at most this many nodes are tried on every device


@dataclasses.dataclass(frozen=True)
class Times:
    """Times of the target, in seconds.

    Attributes:
        passes: time of a pass, by its number of tokens.
        noise: time of drawing and using the noise of one position (0 when greedy).
    """

    passes: Mapping[int, float]
    noise: float = 0.0

    def of(self, nodes: int) -> float:
        """Returns the seconds of a pass over `nodes` tokens, by linear inter- or extrapolation."""
        sizes = sorted(self.passes)
        seconds = [self.passes[size] for size in sizes]
        if nodes <= sizes[-1] or len(sizes) < 2:
            return float(np.interp(nodes, sizes, seconds))
        slope = max(seconds[-1] - seconds[-2], 0.0) / (sizes[-1] - sizes[-2])
        return seconds[-1] + slope * (nodes - sizes[-1])

    def most(self) -> int:
        """Nodes of the largest measured pass that can pay off."""
        limit = _WORTH * self.of(1)
        return max(_ALWAYS_TRIED, *(size for size in self.passes if self.passes[size] <= limit))


@dataclasses.dataclass(frozen=True)
class Steps:
    """Seconds of a draft step, by number of nodes in the step."""

    seconds: Mapping[int, float]

    def of(self, widths: Sequence[int]) -> float:
        sizes = sorted(self.seconds)
        values = [self.seconds[size] for size in sizes]
        return float(sum(np.interp(width, sizes, values) for width in widths))


@dataclasses.dataclass(frozen=True)
class Evidence:
    """The results of calibration at one temperature.

    Attributes:
        times: times of the target.
        steps: times of draft steps, by kind of draft or "recycling".
        learned: results of `DraftTuning.learn`, by kind of draft or "recycling".
        texts: prompts and vanilla's answers.
        copies: what prompt lookup would copy in the same answers.
    """

    times: Times
    steps: Mapping[str, Steps]
    learned: Mapping[str, Any]
    texts: Sequence[tuple[Sequence[int], Sequence[int]]]
    copies: Sequence[Copies]

    def verifying(self, method: Method) -> float:
        """Returns the seconds of a round without the draft: the target's pass, and noise."""
        return self.times.of(method.nodes) + self.times.noise * (method.depth + 1)

    def tokens(self) -> int:
        """Number of tokens in all answers."""
        return sum(len(answer) for _, answer in self.texts)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The predicted τ (tokens per round) and seconds per round of a method."""

    family: str
    method: Method
    tau: float
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tau / self.seconds


def predict(method: Any, evidence: Evidence) -> Prediction:
    """Returns the predicted speed of `method` from the evidence for its family."""
    if method.draft is not None:
        return registry.by_kind(method.draft).tuner().predict(method, evidence)
    seconds, tokens = evidence.verifying(method), evidence.tokens()
    if isinstance(method, Recycling):
        tau = evidence.learned[RECYCLING].tau(method.tree)
        return Prediction(RECYCLING, method, tau, seconds + evidence.steps[RECYCLING].of([1]))
    if isinstance(method, PromptLookup):
        rounds = sum(copy.walk(method.length)[0] for copy in evidence.copies)
        return Prediction("prompt_lookup", method, tokens / max(rounds, 1), seconds)
    if isinstance(method, Lookahead):
        rounds = sum(pooled(p, a, method.ngram, method.guesses) for p, a in evidence.texts)
        return Prediction("lookahead", method, tokens / max(rounds, 1), seconds)
    assert isinstance(method, Vanilla)
    return Prediction("vanilla", method, 1.0, seconds)


def candidates(evidence: Evidence) -> list[Method]:
    """Returns the grid: all methods that the evidence covers and that can pay off here."""
    from eagle_jax.tune.drafts import fitted  # here, because that module imports this one

    most = evidence.times.most()
    out: list[Method] = []
    for kind in evidence.learned:
        if kind != RECYCLING:
            out += registry.by_kind(kind).tuner().candidates(evidence)
    out += [Recycling(tree) for tree in fitted(evidence.learned[RECYCLING], 8, most)]
    out += [copier(length) for length in copy_lengths(most)]
    sizes = [(2, 1, 1), (2, 2, 2), (3, 1, 2), (3, 2, 2), (3, 3, 3), (4, 4, 4), (5, 7, 7)]
    lookaheads = [Lookahead(*size) for size in [*sizes, (5, 15, 15)]]
    out += [method for method in lookaheads if method.nodes <= most]
    return out


def copier(length: int, at_least: int = 1) -> PromptLookup:
    """Returns prompt lookup with the settings that `Copies` assumes."""
    return PromptLookup(COPY["max_ngram"], at_least, length, COPY["latest"], COPY["truncate"])


def copy_lengths(most: int) -> list[int]:
    """Returns the lengths of copied drafts to try, all below `most`."""
    return [n for n in (1, 2, 3, 4, 5, 7, 10, LONGEST_COPY) if n < most]


def finalists(predictions: Sequence[Prediction], more: int = 2) -> list[Prediction]:
    """Returns the best of every family and the `more` best of the others, fastest first."""
    ranked = sorted(predictions, key=lambda p: -p.tokens_per_second)
    best = list({p.family: p for p in reversed(ranked)}.values())
    others = [p for p in ranked if p not in best and p.family != "vanilla"][:more]
    chosen = [p for p in (*best, *others) if p.family != "vanilla"]
    return sorted(chosen, key=lambda p: -p.tokens_per_second)
