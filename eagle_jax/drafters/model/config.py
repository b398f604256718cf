"""Training settings of an independent draft model; its architecture is a `TransformerConfig`."""

from __future__ import annotations

import dataclasses

from eagle_jax.config import TransformerConfig


@dataclasses.dataclass(frozen=True)
class Distillation:
    """Settings of distillation: soft cross-entropy to the target's distribution.

    Attributes:
        draft: the small model to train from random weights; it shares the target's tokenizer.
        target, features: as in `FeatureRegression`.
    """

    draft: TransformerConfig
    target: str
    features: str = ""
