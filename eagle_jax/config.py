"""Configuration of models, data, training and evaluation: frozen dataclasses.

`eagle_jax.settings` reads them from Python files, overrides and checks them.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from eagle_jax.settings import check


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """A decoder-only transformer; field names and meanings are Hugging Face's.

    Attributes:
        vocab_size: rows of the embedding.
        hidden_size: width `d` of the residual stream.
        intermediate_size: width `f` of the SwiGLU block.
        num_hidden_layers: decoder layers.
        num_attention_heads: query heads `h`.
        num_key_value_heads: key/value heads `k`; `h` is a multiple of it.
        head_dim: width `e` of one head.
        rope_theta: base of the rotary embedding.
        rms_norm_eps: epsilon of every RMSNorm.
        max_position_embeddings: longest sequence (prompt and answer together), in tokens.
        tie_word_embeddings: the output head is the embedding matrix.
        attention_bias: biases on the q, k and v projections (Qwen2).
        fused_mlp: gate and up projections are one matrix; in memory only, `eagle_jax.load` sets it.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    fused_mlp: bool = False

    kind: ClassVar[str] = "model"  # as a draft: an independent small model

    def __post_init__(self) -> None:
        check(self)
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads}: must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim}: rotary embedding needs an even number")


@dataclasses.dataclass(frozen=True)
class EagleConfig:
    """The EAGLE-1 draft: `fc` and one decoder layer over the target's features (paper section 4.1).

    Attributes:
        hidden_size: width of the features, equal to the target's.
        intermediate_size, num_attention_heads, num_key_value_heads, head_dim, rope_theta,
            rms_norm_eps, attention_bias, fused_mlp: of its decoder layer, as in
            `TransformerConfig`.
        vocab_size: the target's; the embedding and the head are the target's own, frozen.
        bias: `fc` has a bias (the published default; Llama-3 heads have none).
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
    fused_mlp: bool = False
    bias: bool = True

    kind: ClassVar[str] = "eagle"

    def layer(self) -> TransformerConfig:
        """The draft's single decoder layer, as a one-layer transformer configuration."""
        shared = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "bias"
        }
        return TransformerConfig(num_hidden_layers=1, **shared)


@dataclasses.dataclass(frozen=True)
class Eagle3Config:
    """The EAGLE-3 draft (arXiv 2503.01840): fused target layers, own head over a draft vocabulary.

    Attributes:
        vocab_size: the target's; the embedding is the target's own, frozen.
        draft_vocab_size: rows of the draft's own head; `d2t` maps them to the target's tokens.
        hidden_size: width `d` of the draft, equal to the target's.
        intermediate_size, num_attention_heads, num_key_value_heads, head_dim, rope_theta,
            rms_norm_eps, attention_bias, fused_mlp: of its decoder layer, as in
            `TransformerConfig`.
        aux_layers: which residual streams are fused, by the layer they enter; the number of the
            target's layers means the one that leaves the last. The official rule for L layers is
            2, L // 2, L - 3.
        fc_norm: an RMSNorm on each of them before they are fused (EAGLE-3.1).
        norm_output: the state fed back to the next draft step is the normed one (EAGLE-3.1).
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
    fused_mlp: bool = False
    fc_norm: bool = False
    norm_output: bool = False

    kind: ClassVar[str] = "eagle3"

    def __post_init__(self) -> None:
        check(self)
        if not 1 <= self.draft_vocab_size <= self.vocab_size:
            raise ValueError(
                f"draft_vocab_size={self.draft_vocab_size}: must be 1 to "
                f"vocab_size={self.vocab_size}"
            )
        if not self.aux_layers or min(self.aux_layers) < 0:
            raise ValueError(f"aux_layers={self.aux_layers}: give layer numbers of 0 or more")

    def layer(self) -> TransformerConfig:
        """The draft's single decoder layer, as a one-layer transformer configuration."""
        own = ("draft_vocab_size", "aux_layers", "fc_norm", "norm_output")
        shared = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in own
        }
        return TransformerConfig(num_hidden_layers=1, **shared)


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


# Everything that can be a draft; a configuration's `kind` says which.
DraftConfig = EagleConfig | Eagle3Config | MedusaConfig | TransformerConfig


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where training text comes from and how it is cut into sequences.

    Attributes:
        train: conversations, JSONL (plain or gzip), one file or several.
        validation: the same for held-out conversations.
        tokenizer: a `tokenizer.json`, or a directory that holds one.
        sequence_length: tokens of one packed sequence.
        batch_size: sequences of one optimizer step.
        cache_dir: where the prepared ArrayRecord files live.
        workers: processes that decode and pack; 0 does it in the training process.
        seed: of the shuffle.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...] = ()
    tokenizer: str = ""
    sequence_length: int = 512
    batch_size: int = 64
    cache_dir: str = "~/.cache/eagle_jax/data"
    workers: int = 0
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up.

    Attributes:
        learning_rate: the peak.
        steps: optimizer steps of the whole run.
        warmup_steps: steps of linear rise from zero.
        schedule: after warm-up, "constant", "cosine" or "linear" decay to `final_fraction`.
        final_fraction: last learning rate over the peak.
        b1, b2, eps, weight_decay: AdamW's; decay acts on matrices only.
        clip_value: clip each gradient element to ±this (EAGLE-1's code), or none.
        clip_norm: clip the global norm, or none.
    """

    learning_rate: float
    steps: int
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    final_fraction: float = 0.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_value: float | None = None
    clip_norm: float | None = None


@dataclasses.dataclass(frozen=True)
class NextToken:
    """Objective: next-token cross-entropy on assistant tokens; trains the target.

    Attributes:
        model: the architecture to train from random weights.
    """

    model: TransformerConfig


@dataclasses.dataclass(frozen=True)
class FeatureRegression:
    """Objective of EAGLE-1 (paper section 4.2): features by smooth L1, tokens by distillation.

    Attributes:
        draft: the architecture to train from random weights.
        target: a directory that `eagle_jax.load` reads, or the name of a shipped pair.
        feature_weight: weight of smooth L1 between predicted and real features.
        token_weight: weight of the soft cross-entropy through the target's head.
        noise: half-width of the uniform noise added to input features, as the paper has it.
    """

    draft: EagleConfig
    target: str
    feature_weight: float = 1.0
    token_weight: float = 0.1
    noise: float = 0.1


@dataclasses.dataclass(frozen=True)
class TrainingTimeTest:
    """Objective of EAGLE-3 (section 3.1): several draft steps on the draft's own states.

    Attributes:
        draft: the architecture to train from random weights.
        target: as in `FeatureRegression`.
        steps: draft steps per position.
        decay: step i has weight `decay ** i`.
        mean: over the rows that count ("masked"), or over all rows, as the official code divides.
        loss: soft cross-entropy ("kl") to the target's distribution over the draft vocabulary, or
            the acceptance rate itself ("lk": arXiv 2602.23881's hybrid of KL and total variation).
    """

    draft: Eagle3Config
    target: str
    steps: int = 7
    decay: float = 0.8
    mean: Literal["masked", "all"] = "masked"
    loss: Literal["kl", "lk"] = "kl"


@dataclasses.dataclass(frozen=True)
class MedusaTraining:
    """Objective of Medusa-1 (section 2.2): each head by cross-entropy to the text.

    Attributes:
        draft: the heads to train.
        target: as in `FeatureRegression`.
        decay: head i (from 0) has weight `decay ** i`.
        labels: the text's own tokens ("hard"), or the target's distribution ("soft").
    """

    draft: MedusaConfig
    target: str
    decay: float = 0.8
    labels: Literal["hard", "soft"] = "hard"


@dataclasses.dataclass(frozen=True)
class Distillation:
    """Objective of an independent draft model: the target's distribution by soft cross-entropy.

    Attributes:
        draft: the small model to train from random weights; shares the target's tokenizer.
        target: as in `FeatureRegression`.
    """

    draft: TransformerConfig
    target: str


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
        output_dir: receives checkpoints, events, the loss curve and the final export.
        objective: what is trained, against what.
        data: the text.
        optim: the optimizer.
        seed: of initial weights and of noise.
        compute_dtype: dtype of activations; weights and optimizer state are float32.
        eval_every, eval_batches: validation interval in steps, and its length (0: no validation).
        checkpoint_every: steps between checkpoints.
        keep_checkpoints: how many of the newest stay.
        export_dtype: dtype of the exported safetensors.
        fsdp: devices that share one copy of weights and optimizer state; all share the batch.
        peak_flops: of one device, for MFU; 0 looks the device up.
        attention: "xla", or cuDNN's fused kernel: bfloat16 on a GPU, where it takes half the time
            and never holds scores of all pairs of tokens.
        remat: recompute activations in the backward pass, which saves memory for time.
    """

    output_dir: str
    objective: NextToken | FeatureRegression | TrainingTimeTest | MedusaTraining | Distillation
    data: DataConfig
    optim: OptimConfig
    seed: int = 0
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    eval_every: int = 500
    eval_batches: int = 8
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    export_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    fsdp: int = 1
    peak_flops: float = 0.0
    attention: Literal["xla", "cudnn"] = "xla"
    remat: bool = False
