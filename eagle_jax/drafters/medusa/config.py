"""Configuration of Medusa heads and of their training."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from eagle_jax.settings import check


@dataclasses.dataclass(frozen=True)
class MedusaConfig:
    """Medusa heads (arXiv 2401.10774): head i predicts the token i + 2 places after its feature.

    Attributes:
        vocab_size, hidden_size: the target's.
        num_heads: tokens drafted ahead.
        num_layers: residual blocks of each head.
        tie_lm_head: every head has a square matrix of its own before the target's frozen head;
            otherwise its own vocabulary head, as published heads do. (Without that matrix a head
            would hardly do: a residual block cannot take away what its input says of the token
            that comes first.)
    """

    vocab_size: int
    hidden_size: int
    num_heads: int = 4
    num_layers: int = 1
    tie_lm_head: bool = False

    kind: ClassVar[str] = "medusa"

    def __post_init__(self) -> None:
        check(self)
        for name in ("vocab_size", "hidden_size", "num_heads", "num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")


@dataclasses.dataclass(frozen=True)
class MedusaTraining:
    """Objective of Medusa-1 (section 2.2): each head by cross-entropy to the text.

    Attributes:
        draft: the heads to train.
        target: as in `FeatureRegression`.
        decay: head i (from 0) has weight `decay ** i`.
        labels: the text's own tokens ("hard"), or the target's distribution ("soft").
        features: as in `FeatureRegression`.
    """

    draft: MedusaConfig
    target: str
    decay: float = 0.8
    labels: Literal["hard", "soft"] = "hard"
    features: str = ""
