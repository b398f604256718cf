"""Tokens per second of any method, from times and acceptance measured on a few.

A round takes the target's pass over the tree's nodes, the draft's steps, and at temperature > 0
the noise of every depth. It commits tau tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eagle_jax.decode import (
    DynamicTree,
    Eagle,
    EagleLookup,
    Lookahead,
    Medusa,
    PromptLookup,
    Recycling,
    Speculative,
    Vanilla,
    best_tree,
    chain,
    static_tree,
)
from eagle_jax.decode.method import Method
from eagle_jax.decode.tree import MC_SIM_7B_63, StaticTree
from eagle_jax.tune.acceptance import COPY, LONGEST_COPY, Copies, Pools, Ranks, pooled

# A round cannot commit more than its tree is deep, and hardly ever does that: passes that take
# longer than so many single ones are not worth their tree.
_WORTH = 3.0
_LEAST = 4  # nodes that are tried anyway


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of the target.

    Attributes:
        passes: of a pass over so many tokens.
        noise: of drawing one position's noise, and of using it (0 when greedy).
    """

    passes: Mapping[int, float]
    noise: float = 0.0

    def of(self, nodes: int) -> float:
        """A pass over `nodes` tokens: between those measured on a line, beyond them on the last."""
        sizes = sorted(self.passes)
        seconds = [self.passes[size] for size in sizes]
        if nodes <= sizes[-1] or len(sizes) < 2:
            return float(np.interp(nodes, sizes, seconds))
        slope = max(seconds[-1] - seconds[-2], 0.0) / (sizes[-1] - sizes[-2])
        return seconds[-1] + slope * (nodes - sizes[-1])

    def most(self) -> int:
        """The largest measured tree that can be worth its pass."""
        limit = _WORTH * self.of(1)
        return max(_LEAST, *(size for size in self.passes if self.passes[size] <= limit))


@dataclasses.dataclass(frozen=True)
class Steps:
    """Seconds of a draft: of a step over so many nodes, by number of nodes."""

    seconds: Mapping[int, float]

    def of(self, widths: Sequence[int]) -> float:
        sizes = sorted(self.seconds)
        values = [self.seconds[size] for size in sizes]
        return float(sum(np.interp(width, sizes, values) for width in widths))


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What calibration found at one temperature.

    Attributes:
        times: of the target.
        steps: of drafts, by kind; "recycling" too.
        pools: of EAGLE heads, by kind.
        ranks: of "medusa", "model" and "recycling".
        texts: prompts and vanilla's answers.
        copies: of the same answers.
    """

    times: Times
    steps: Mapping[str, Steps]
    pools: Mapping[str, Pools]
    ranks: Mapping[str, Ranks]
    texts: Sequence[tuple[Sequence[int], Sequence[int]]]
    copies: Sequence[Copies]


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a method should do: tokens a round, seconds a round."""

    family: str
    method: Method
    tau: float
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tau / self.seconds


def widths(tree: StaticTree | DynamicTree) -> list[int]:
    """Nodes that each step of an EAGLE draft reads; the first is the root's."""
    if isinstance(tree, DynamicTree):
        return [1] + [tree.k] * (tree.depth - 1)
    parents = {path[:-1] for path in tree.paths}
    counts = [sum(len(path) == depth for path in parents) for depth in range(tree.depth)]
    return [count for count in counts if count]


def predict(method: Any, evidence: Evidence) -> Prediction:
    """What `method` should do, by the evidence for its family."""
    if isinstance(method, EagleLookup):
        return _with_lookup(method, evidence)
    seconds = evidence.times.of(method.nodes) + evidence.times.noise * (method.depth + 1)
    if isinstance(method, Eagle):
        pools = evidence.pools[method.head]
        if isinstance(method.tree, DynamicTree):
            tau = pools.tau(method.tree)
        else:
            tau = pools.ranks().tau(method.tree)
        seconds += evidence.steps[method.head].of(widths(method.tree))
        return Prediction(method.head, method, tau, seconds)
    if isinstance(method, Speculative):
        tau = evidence.ranks["model"].tau(chain(method.length))
        seconds += evidence.steps["model"].of([1] * method.length)
        return Prediction("speculative", method, tau, seconds)
    if isinstance(method, Medusa | Recycling):
        name = "medusa" if isinstance(method, Medusa) else "recycling"
        seconds += evidence.steps[name].of([1])
        return Prediction(name, method, evidence.ranks[name].tau(method.tree), seconds)
    tokens = sum(len(answer) for _, answer in evidence.texts)
    if isinstance(method, PromptLookup):
        rounds = sum(copy.walk(method.length)[0] for copy in evidence.copies)
        return Prediction("prompt_lookup", method, tokens / max(rounds, 1), seconds)
    if isinstance(method, Lookahead):
        rounds = sum(pooled(p, a, method.ngram, method.guesses) for p, a in evidence.texts)
        return Prediction("lookahead", method, tokens / max(rounds, 1), seconds)
    assert isinstance(method, Vanilla)
    return Prediction("vanilla", method, 1.0, seconds)


def _with_lookup(method: EagleLookup, evidence: Evidence) -> Prediction:
    eagle = predict(method.eagle, evidence)
    walks = [
        copy.walk(method.lookup.length, method.lookup.min_ngram, eagle.tau)
        for copy in evidence.copies
    ]
    copying, others = (sum(counts) for counts in zip(*walks, strict=True))
    shared = evidence.times.of(method.nodes) + evidence.times.noise * (method.depth + 1)
    steps = evidence.steps[method.eagle.head]
    # The first step catches up with what was committed, whoever drafts.
    seconds = copying * (shared + steps.of([1]))
    seconds += others * (shared + steps.of(widths(method.eagle.tree)))
    rounds = max(copying + others, 1)
    tokens = sum(len(answer) for _, answer in evidence.texts)
    return Prediction("eagle_lookup", method, tokens / rounds, seconds / rounds)


def candidates(evidence: Evidence) -> list[Method]:
    """The grid: everything that the drafts there are evidence for allow and this device can use."""
    most = evidence.times.most()
    out: list[Method] = []
    for head, pools in evidence.pools.items():
        kind: Any = head
        deepest = pools.tree.depth
        trees: list[StaticTree | DynamicTree] = [chain(d) for d in range(1, deepest + 1)]
        trees += [static_tree([[0], [1]]), static_tree([[0], [1], [2]]), MC_SIM_7B_63]
        trees += _fitted(pools.ranks(), pools.tree.k, most)
        trees += [
            DynamicTree(depth, k, drafted)
            for depth in range(2, deepest + 1)
            for k in (2, 3, 4, 6, 8, 10)
            for drafted in (2, 3, 5, 7, 11, 15, 23, 31, 47, 59)
            if k <= pools.tree.k and drafted <= min(pools.tree.drafted, k + (depth - 1) * k**2)
        ]
        own = [Eagle(tree, head=kind) for tree in dict.fromkeys(trees) if tree.nodes <= most]
        out += own
        ranked = sorted(own, key=lambda m: -predict(m, evidence).tokens_per_second)
        out += [EagleLookup(eagle, copier(n, 6)) for eagle in ranked[:2] for n in _lengths(most)]
    if "medusa" in evidence.ranks:
        out += [Medusa(tree) for tree in _fitted(evidence.ranks["medusa"], 10, most)]
    if "model" in evidence.ranks:
        longest = evidence.ranks["model"].ranks.shape[1]
        out += [Speculative(length) for length in range(1, longest + 1)]
    out += [Recycling(tree) for tree in _fitted(evidence.ranks["recycling"], 8, most)]
    out += [copier(length) for length in _lengths(most)]
    sizes = [(2, 1, 1), (2, 2, 2), (3, 1, 2), (3, 2, 2), (3, 3, 3), (4, 4, 4), (5, 7, 7)]
    lookaheads = [Lookahead(*size) for size in [*sizes, (5, 15, 15)]]
    out += [method for method in lookaheads if method.nodes <= most]
    return out


def copier(length: int, at_least: int = 1) -> PromptLookup:
    """Prompt lookup as `Copies` counts it."""
    return PromptLookup(COPY["max_ngram"], at_least, length, COPY["latest"], COPY["truncate"])


def _lengths(most: int) -> list[int]:
    return [n for n in (1, 2, 3, 4, 5, 7, 10, LONGEST_COPY) if n < most]


def _fitted(ranks: Ranks, widest: int, most: int) -> list[StaticTree]:
    """The best static trees of a few sizes for what was seen."""
    accuracy = ranks.accuracy(widest)
    sizes = [n for n in (1, 2, 3, 5, 7, 11, 15, 23, 31, 47, 63) if n < most]
    return [best_tree(accuracy, n) for n in sizes if n <= widest or len(accuracy) > 1]


def finalists(predictions: Sequence[Prediction], more: int = 2) -> list[Prediction]:
    """The best of every family, and the `more` best of the others; fastest first."""
    ranked = sorted(predictions, key=lambda p: -p.tokens_per_second)
    best = list({p.family: p for p in reversed(ranked)}.values())
    others = [p for p in ranked if p not in best and p.family != "vanilla"][:more]
    chosen = [p for p in (*best, *others) if p.family != "vanilla"]
    return sorted(chosen, key=lambda p: -p.tokens_per_second)
