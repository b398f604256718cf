"""Tuning of Medusa heads: the ranks of accepted candidates determine the best trees."""

from __future__ import annotations

from typing import Any

from eagle_jax.decode.method import Method
from eagle_jax.decode.tree import best_tree
from eagle_jax.drafters.medusa.method import ACCURACY, Medusa
from eagle_jax.tune.acceptance import Recorder
from eagle_jax.tune.drafts import DraftTuning, fitted
from eagle_jax.tune.predict import Evidence


class MedusaTuning(DraftTuning):
    """Tuning of Medusa heads; all of them run in every round, so drafting costs the same."""

    def probe(self, config: Any, most: int, rounds: int) -> Method:
        tree = best_tree(ACCURACY[: config.num_heads], min(max(most - 1, 7), 63))
        return Recorder(Medusa(tree), rounds)

    def candidates(self, evidence: Evidence) -> list[Method]:
        ranks = evidence.learned[self.spec.kind]
        return [Medusa(tree) for tree in fitted(ranks, 10, evidence.times.most())]
