"""Tuning of a small draft model: the record of one chain predicts τ for all shorter chains."""

from __future__ import annotations

from typing import Any

from eagle_jax.decode.method import Method
from eagle_jax.drafters.model.method import Speculative
from eagle_jax.tune.acceptance import Recorder
from eagle_jax.tune.drafts import DraftTuning
from eagle_jax.tune.predict import Evidence, Steps

_LENGTH = 6  # length of the recorded chain


class ModelTuning(DraftTuning):
    """Tuning of speculative sampling, where every drafted token costs a step of the draft model."""

    family = "speculative"

    def probe(self, config: Any, most: int, rounds: int) -> Method:
        del config, most
        return Recorder(Speculative(_LENGTH), rounds)

    def steps(self, probe: Any, whole: float, beside: float | None) -> Steps:
        del beside
        return Steps({1: whole / probe.depth})

    def passes(self, method: Any) -> list[int]:
        return [1] * method.length

    def candidates(self, evidence: Evidence) -> list[Method]:
        longest = evidence.learned[self.spec.kind].ranks.shape[1]
        return [Speculative(length) for length in range(1, longest + 1)]
