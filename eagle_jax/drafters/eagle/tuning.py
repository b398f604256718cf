"""Tuning of EAGLE heads: the record of one wide dynamic tree predicts τ for every other tree."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from eagle_jax.decode.method import Context, Method, Models, Prompt, Verified
from eagle_jax.decode.methods.eagle_lookup import EagleLookup
from eagle_jax.decode.tree import (
    MC_SIM_7B_63,
    DynamicTree,
    Proposal,
    StaticTree,
    chain,
    kept,
    rerank,
    static_tree,
)
from eagle_jax.drafters.eagle.method import Eagle, EagleState
from eagle_jax.tune.acceptance import Pools, Record, Recorder, empty_record, noted
from eagle_jax.tune.drafts import DraftTuning, fitted
from eagle_jax.tune.predict import Evidence, Prediction, Steps, copier, copy_lengths

_CHAIN = 3  # length of the chain that measures the cost of a draft step


@dataclasses.dataclass(frozen=True)
class PoolRecorder(Recorder):
    """EAGLE with a dynamic tree that records accepted candidates and the scores of the pool.

    The nodes in the record are indices into the pool.

    Attributes:
        inner: an `Eagle` with a `DynamicTree`.
    """

    def init(self, models: Models, prompt: Prompt, slots: int) -> Record:
        inner = self.inner.init(models, prompt, slots)
        rows, tree = prompt.tokens.shape[0], self.inner.tree
        now = (
            jnp.zeros((rows, tree.drafted), jnp.int32),
            jnp.zeros((rows, tree.pool), jnp.float32),
        )
        return empty_record(inner, now, rows, self.rounds, tree.depth, tree.pool)

    def propose(self, models: Models, context: Context, state: Record) -> tuple[Proposal, Record]:
        eagle: Eagle = self.inner
        tree = eagle.tree
        assert isinstance(tree, DynamicTree)
        feature, inner = eagle.catch_up(models, context, state.inner)
        pool = eagle.pool(tree, models, context, inner, feature)
        scores = pool[1].astype(jnp.float32)
        chosen = jax.vmap(functools.partial(kept, tree=tree))(pool[1])
        proposal = rerank(*pool, context.root(), tree)
        return proposal, dataclasses.replace(state, inner=inner, now=(chosen, scores))

    def update(self, models: Models, state: Record, verified: Verified) -> Record:
        inner: EagleState = self.inner.update(models, state.inner, verified)
        chosen, scores = state.now
        node = jnp.maximum(verified.path[:, 1:] - 1, 0)
        found = jnp.take_along_axis(chosen, node, axis=1, mode="clip").astype(jnp.int32)
        return noted(state, verified, found, scores, inner)


def widths(tree: StaticTree | DynamicTree) -> list[int]:
    """Returns the number of nodes that each draft step reads; the first step reads the root."""
    if isinstance(tree, DynamicTree):
        return [1] + [tree.k] * (tree.depth - 1)
    parents = {path[:-1] for path in tree.paths}
    counts = [sum(len(path) == depth for path in parents) for depth in range(tree.depth)]
    return [count for count in counts if count]


class EagleTuning(DraftTuning):
    """Tuning of EAGLE heads, alone and combined with prompt lookup.

    Attributes:
        deepest: depth of the recorded tree on fast devices.
    """

    deepest: ClassVar[int] = 6

    def probe(self, config: Any, most: int, rounds: int) -> Method:
        drafted = max(most - 1, 7)
        # Every level adds compile time, most of all on CPUs.
        slow = most < 32 or jax.default_backend() == "cpu"
        depth, k = (4, 4) if slow else (self.deepest, 10)
        tree = DynamicTree(depth, k, min(drafted, 59, k + (depth - 1) * k * k))
        return PoolRecorder(Eagle(tree, head=self.spec.kind), rounds)

    def beside(self) -> Method:
        return Eagle(chain(_CHAIN), head=self.spec.kind)

    def learn(self, records: Sequence[Record], probe: Any) -> Pools:
        return Pools.of(records, probe.inner.tree)

    def steps(self, probe: Any, whole: float, beside: float | None) -> Steps:
        assert beside is not None
        one = beside / _CHAIN
        wide = (whole - one) / max(probe.depth - 1, 1)
        return Steps({1: one, probe.inner.tree.k: max(wide, one)})

    def candidates(self, evidence: Evidence) -> list[Method]:
        pools: Pools = evidence.learned[self.spec.kind]
        most, deepest = evidence.times.most(), pools.tree.depth
        trees: list[StaticTree | DynamicTree] = [chain(d) for d in range(1, deepest + 1)]
        trees += [static_tree([[0], [1]]), static_tree([[0], [1], [2]]), MC_SIM_7B_63]
        trees += fitted(pools.ranks(), pools.tree.k, most)
        trees += [
            DynamicTree(depth, k, drafted)
            for depth in range(2, deepest + 1)
            for k in (2, 3, 4, 6, 8, 10)
            for drafted in (2, 3, 5, 7, 11, 15, 23, 31, 47, 59)
            if k <= pools.tree.k and drafted <= min(pools.tree.drafted, k + (depth - 1) * k**2)
        ]
        found = [Eagle(tree, head=self.spec.kind) for tree in dict.fromkeys(trees)]
        own = [method for method in found if method.nodes <= most]
        ranked = sorted(own, key=lambda m: -self.predict(m, evidence).tokens_per_second)
        lookups = [EagleLookup(e, copier(n, 6)) for e in ranked[:2] for n in copy_lengths(most)]
        return [*own, *lookups]

    def predict(self, method: Any, evidence: Evidence) -> Prediction:
        if isinstance(method, EagleLookup):
            return self._with_lookup(method, evidence)
        pools: Pools = evidence.learned[self.spec.kind]
        dynamic = isinstance(method.tree, DynamicTree)
        tau = pools.tau(method.tree) if dynamic else pools.ranks().tau(method.tree)
        steps = evidence.steps[self.spec.kind].of(widths(method.tree))
        return Prediction(self.spec.kind, method, tau, evidence.verifying(method) + steps)

    def _with_lookup(self, method: EagleLookup, evidence: Evidence) -> Prediction:
        eagle = self.predict(method.eagle, evidence)
        walks = [
            copy.walk(method.lookup.length, method.lookup.min_ngram, eagle.tau)
            for copy in evidence.copies
        ]
        copying, others = (sum(counts) for counts in zip(*walks, strict=True))
        shared, steps = evidence.verifying(method), evidence.steps[self.spec.kind]
        # The catch-up step runs in every round, also when the lookup drafts.
        seconds = copying * (shared + steps.of([1]))
        seconds += others * (shared + steps.of(widths(method.eagle.tree)))
        rounds = max(copying + others, 1)
        return Prediction("eagle_lookup", method, evidence.tokens() / rounds, seconds / rounds)
