"""Configuration of the EAGLE-1 draft and of its training."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from eagle_jax.config import RopeScaling, TransformerConfig, check_draft_vocabulary
from eagle_jax.settings import check


@dataclasses.dataclass(frozen=True)
class EagleConfig:
    """The EAGLE-1 draft: `fc` and one decoder layer over the target's features (paper section 4.1).

    Attributes:
        hidden_size: width of the features, equal to the target's.
        intermediate_size, num_attention_heads, num_key_value_heads, head_dim, rope_theta,
            rms_norm_eps, attention_bias, rope_scaling: settings of its decoder layer, as in
            `TransformerConfig`.
        vocab_size: the target's vocabulary size; embedding and head are the target's own, frozen.
        bias: whether `fc` has a bias (the published default; Llama-3 heads have none).
        draft_vocab_size: number of the target's tokens that can be drafted, through columns of its
            head; `d2t` maps entries to tokens. None allows all tokens.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    attention_bias: bool = False
    bias: bool = True
    rope_scaling: RopeScaling | None = None
    draft_vocab_size: int | None = None

    kind: ClassVar[str] = "eagle"

    def __post_init__(self) -> None:
        check(self)
        check_draft_vocabulary(self.draft_vocab_size, self.vocab_size)

    def layer(self) -> TransformerConfig:
        """The draft's single decoder layer, as a one-layer transformer configuration."""
        shared = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("bias", "draft_vocab_size")
        }
        return TransformerConfig(num_hidden_layers=1, **shared)


@dataclasses.dataclass(frozen=True)
class FeatureRegression:
    """Settings of EAGLE-1's objective (paper section 4.2): smooth L1 and distillation.

    Attributes:
        draft: the architecture to train from random weights.
        target: a directory that `eagle_jax.load` reads, or the name of a shipped pair.
        feature_weight: weight of the smooth L1 loss between predicted and real features.
        token_weight: weight of the token loss, computed through the target's head.
        loss: the token loss: soft cross-entropy ("kl"), or a hybrid of KL and total variation that
            optimises the acceptance rate ("lk", arXiv 2602.23881).
        noise: half-width of the uniform noise added to input features, as in the paper.
        features: a directory that `python -m eagle_jax.train.features` wrote. The target's features
            are then read from it, and only the target's embedding, final norm and head are loaded.
            If empty, the target runs in every step.
    """

    draft: EagleConfig
    target: str
    feature_weight: float = 1.0
    token_weight: float = 0.1
    loss: Literal["kl", "lk"] = "kl"
    noise: float = 0.1
    features: str = ""
