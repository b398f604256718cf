"""Configuration of Medusa heads and of their training."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from eagle_jax.settings import check


@dataclasses.dataclass(frozen=True)
class MedusaConfig:
    """Medusa heads (arXiv 2401.10774): head i predicts the token i + 2 places after its feature.

    Attributes:
        vocab_size, hidden_size: sizes of the target.
        num_heads: number of heads, i.e. of tokens drafted ahead.
        num_layers: residual blocks of each head.
        tie_lm_head: whether the heads share the target's frozen vocabulary head, each after its own
            square matrix; otherwise every head has its own vocabulary head, as in published heads.
            (The square matrix is needed because a residual block cannot remove what its input
            encodes about the token right after the feature.)
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
    """Settings of Medusa-1's objective (section 2.2): cross-entropy of every head.

    Attributes:
        draft: the heads to train.
        target: as in `FeatureRegression`.
        decay: head i (from 0) has weight `decay ** i`.
        labels: the tokens of the text ("hard"), or the target's distribution ("soft").
        features: as in `FeatureRegression`.
    """

    draft: MedusaConfig
    target: str
    decay: float = 0.8
    labels: Literal["hard", "soft"] = "hard"
    features: str = ""
