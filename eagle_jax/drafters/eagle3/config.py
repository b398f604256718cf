"""Configuration of the EAGLE-3 draft and of its training."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from eagle_jax.config import RopeScaling, TransformerConfig, check_draft_vocabulary
from eagle_jax.settings import check


@dataclasses.dataclass(frozen=True)
class Eagle3Config:
    """The EAGLE-3 draft (arXiv 2503.01840): fused target layers, own head over a draft vocabulary.

    Attributes:
        vocab_size: the target's vocabulary size; the embedding is the target's own, frozen.
        draft_vocab_size: entries of the draft's own head; `d2t` maps them to the target's tokens.
        hidden_size: width `d` of the draft.
        intermediate_size, num_attention_heads, num_key_value_heads, head_dim, rope_theta,
            rms_norm_eps, attention_bias, rope_scaling: settings of its decoder layer, as in
            `TransformerConfig`.
        aux_layers: the residual streams to fuse, by the layer that each enters; the number of the
            target's layers stands for the stream that leaves the last layer. The official rule for
            L >= 7 layers is 2, L // 2, L - 3.
        fc_norm: whether each stream passes an RMSNorm before they are fused (EAGLE-3.1).
        norm_output: whether the next draft step reads the normed state (EAGLE-3.1).
        target_hidden_size: the target's width if it differs from the draft's; such a draft has its
            own embedding.
    """

    vocab_size: int
    draft_vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    aux_layers: tuple[int, ...]
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    attention_bias: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    rope_scaling: RopeScaling | None = None
    target_hidden_size: int | None = None

    kind: ClassVar[str] = "eagle3"

    def __post_init__(self) -> None:
        check(self)
        check_draft_vocabulary(self.draft_vocab_size, self.vocab_size)
        if not self.aux_layers or min(self.aux_layers) < 0:
            raise ValueError(f"aux_layers={self.aux_layers}: give layer numbers of 0 or more")
        width = self.target_hidden_size
        if width is not None and (width < 1 or width == self.hidden_size):
            raise ValueError(
                f"target_hidden_size={self.target_hidden_size}: must be positive and differ from "
                f"hidden_size={self.hidden_size}, or None"
            )

    @property
    def feature_size(self) -> int:
        """Width of the residual streams that are fused: the target's."""
        return self.target_hidden_size or self.hidden_size

    def layer(self) -> TransformerConfig:
        """The draft's single decoder layer, as a one-layer transformer configuration."""
        own = ("draft_vocab_size", "aux_layers", "fc_norm", "norm_output", "target_hidden_size")
        shared = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in own
        }
        return TransformerConfig(num_hidden_layers=1, **shared)


@dataclasses.dataclass(frozen=True)
class TrainingTimeTest:
    """Settings of EAGLE-3's objective (section 3.1): draft steps on the draft's own states.

    Attributes:
        draft: the architecture to train from random weights.
        target: as in `FeatureRegression`.
        steps: draft steps per position.
        decay: step i has weight `decay ** i`.
        mean: whether the loss is averaged over the rows with a label ("masked") or over all rows
            ("all"), as in the official code.
        loss: as in `FeatureRegression`, over the draft vocabulary.
        features: as in `FeatureRegression`.
    """

    draft: Eagle3Config
    target: str
    steps: int = 7
    decay: float = 0.8
    mean: Literal["masked", "all"] = "masked"
    loss: Literal["kl", "lk"] = "kl"
    features: str = ""
