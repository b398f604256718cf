"""Training of an independent draft model; its architecture is `TransformerConfig`."""

from __future__ import annotations

import dataclasses

from eagle_jax.config import TransformerConfig


@dataclasses.dataclass(frozen=True)
class Distillation:
    """Objective of an independent draft model: the target's distribution by soft cross-entropy.

    Attributes:
        draft: the small model to train from random weights; shares the target's tokenizer.
        target, features: as in `FeatureRegression`.
    """

    draft: TransformerConfig
    target: str
    features: str = ""
