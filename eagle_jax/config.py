"""Configuration of models, data and training: frozen dataclasses.

`eagle_jax.settings` reads them from Python files, applies overrides and checks them. The drafters'
classes (`EagleConfig`, `FeatureRegression`, ...) are defined in `eagle_jax.drafters.<kind>.config`
and can be imported from this module too.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

from eagle_jax.settings import check

if TYPE_CHECKING:
    from eagle_jax.drafters.eagle.config import EagleConfig, FeatureRegression
    from eagle_jax.drafters.eagle3.config import Eagle3Config, TrainingTimeTest
    from eagle_jax.drafters.medusa.config import MedusaConfig, MedusaTraining
    from eagle_jax.drafters.model.config import Distillation

__all__ = [
    "DataConfig",
    "Distillation",
    "DraftConfig",
    "DraftObjective",
    "Eagle3Config",
    "EagleConfig",
    "FeatureRegression",
    "MedusaConfig",
    "MedusaTraining",
    "NextToken",
    "OptimConfig",
    "RopeScaling",
    "TrainConfig",
    "TrainingTimeTest",
    "TransformerConfig",
    "check_draft_vocabulary",
]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Scaling of the rotary embedding for contexts longer than those of pre-training.

    Attributes:
        rope_type: "linear" divides every frequency by `factor`; "llama3" divides only the low
            frequencies, with a ramp between low and high; "yarn" (arXiv 2309.00071) has a ramp over
            dimensions and scales attention scores.
        factor: ratio of the new context length to the original one.
        original_max_position_embeddings: context of pre-training, in tokens; unused by "linear".
        low_freq_factor, high_freq_factor: for "llama3", with L the original context: frequencies of
            wavelength above L / low_freq_factor are divided by `factor`, those below
            L / high_freq_factor are kept.
        beta_fast, beta_slow: for "yarn", the numbers of rotations within the original context
            between which the ramp lies.
        attention_factor: for "yarn", multiplies queries and keys; by default 0.1 ln(factor) + 1.
        mscale, mscale_all_dim: for "yarn": if both are given, the default attention factor is
            (0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1).
        truncate: for "yarn", round the ramp's bounds to whole dimensions.
    """

    rope_type: Literal["linear", "llama3", "yarn"]
    factor: float
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        check(self)
        if self.factor <= 0:
            raise ValueError(f"factor={self.factor}: must be positive")
        if self.rope_type != "linear" and not self.original_max_position_embeddings:
            raise ValueError(
                f"original_max_position_embeddings={self.original_max_position_embeddings}: "
                f"rope_type={self.rope_type!r} needs the context of pre-training, in tokens"
            )
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor}: must be less than "
                f"high_freq_factor={self.high_freq_factor}"
            )


LayerType = Literal["full_attention", "sliding_attention"]


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """The architecture of a decoder-only transformer, with Hugging Face's field names.

    The defaults are Llama's; `eagle_jax.checkpoint.families` lists what other families set.

    Attributes:
        vocab_size: rows of the embedding matrix.
        hidden_size: width `d` of the residual stream.
        intermediate_size: width `f` of the gated feed-forward block.
        num_hidden_layers: decoder layers.
        num_attention_heads: query heads `h`.
        num_key_value_heads: key/value heads `k`; `h` is a multiple of it.
        head_dim: width `e` of one head.
        rope_theta: base of the rotary embedding.
        rms_norm_eps: epsilon of every RMSNorm.
        max_position_embeddings: longest sequence (prompt and answer together), in tokens.
        tie_word_embeddings: the output head is the embedding matrix.
        attention_bias: biases on the q, k and v projections (Qwen2).
        rope_scaling: scaling of the rotary embedding for long contexts, or None.
        rope_local_base_freq: base of the rotary embedding in sliding-window layers, which is not
            scaled (Gemma 3); None: these layers use the same rotary embedding as the others.
        sliding_window: a token attends to itself and the `sliding_window - 1` positions before it.
        layer_types: the attention type of each layer; empty: every layer has the sliding window.
        hidden_act: activation function of the gate.
        qk_norm: apply an RMSNorm to each head's queries and keys (Qwen3, Gemma 3).
        query_pre_attn_scalar: attention scores are divided by its square root; by default
            `head_dim`.
        attn_logit_softcapping: attention scores x become c tanh(x / c) with this c; None: no cap.
        final_logit_softcapping: the same for the output logits.
        post_norms: apply norms after attention and after the feed-forward block too (Gemma 2, 3).
        unit_offset_norm: RMSNorm multiplies by 1 + its scale (Gemma).
        scale_embeddings: multiply embeddings by the square root of `hidden_size` (Gemma).
        num_experts: experts of a mixture-of-experts layer; 0: a dense feed-forward block.
        num_experts_per_tok: experts that the router chooses for each token.
        moe_intermediate_size: width of an expert; by default `intermediate_size`.
        norm_topk_prob: normalise the chosen experts' weights to a sum of 1.
        mlp_only_layers: layers that have a dense block although `num_experts` is set.
        model_type: family of the checkpoint, used for export; it does not affect the computation.
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
    rope_scaling: RopeScaling | None = None
    rope_local_base_freq: float | None = None
    sliding_window: int | None = None
    layer_types: tuple[LayerType, ...] = ()
    hidden_act: Literal["silu", "gelu_pytorch_tanh"] = "silu"
    qk_norm: bool = False
    query_pre_attn_scalar: int | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    post_norms: bool = False
    unit_offset_norm: bool = False
    scale_embeddings: bool = False
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int | None = None
    norm_topk_prob: bool = True
    mlp_only_layers: tuple[int, ...] = ()
    # Not compared, so that equal architectures share compiled programs whatever their family.
    model_type: str | None = dataclasses.field(default=None, compare=False)

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
        for name in (
            "sliding_window",
            "query_pre_attn_scalar",
            "attn_logit_softcapping",
            "final_logit_softcapping",
            "moe_intermediate_size",
            "rope_local_base_freq",
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value}: must be positive, or None")
        self._check_layers()

    def _check_layers(self) -> None:
        layers = self.num_hidden_layers
        if len(self.layer_types) not in (0, layers):
            raise ValueError(
                f"layer_types: has {len(self.layer_types)} entries; give one for each of the "
                f"num_hidden_layers={layers}, or none"
            )
        if "sliding_attention" in self.layer_types and self.sliding_window is None:
            raise ValueError("sliding_window=None: layer_types has sliding layers; give its width")
        if self.num_experts < 0:
            raise ValueError(f"num_experts={self.num_experts}: must be 0 or more")
        if self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok}: must be 1 to "
                f"num_experts={self.num_experts}"
            )
        if any(not 0 <= layer < layers for layer in self.mlp_only_layers):
            raise ValueError(f"mlp_only_layers={self.mlp_only_layers}: must be 0 to {layers - 1}")

    def window(self, layer: int) -> int | None:
        """Returns the sliding window of a layer in positions, or None for full attention."""
        sliding = not self.layer_types or self.layer_types[layer] == "sliding_attention"
        return self.sliding_window if sliding else None

    def has_experts(self, layer: int) -> bool:
        """Returns whether a layer has a router and experts instead of a dense block."""
        return self.num_experts > 0 and layer not in self.mlp_only_layers


def check_draft_vocabulary(size: int | None, vocab_size: int) -> None:
    """Raises ValueError if a draft vocabulary is empty or larger than the target's."""
    if size is not None and not 1 <= size <= vocab_size:
        raise ValueError(f"draft_vocab_size={size}: must be 1 to vocab_size={vocab_size}")


@runtime_checkable
class DraftConfig(Protocol):
    """Protocol of a draft's architecture; see `eagle_jax.drafters.DrafterSpec`.

    Attributes:
        kind: the drafter's name.
        vocab_size: size of the target's vocabulary.
    """

    kind: ClassVar[str]

    @property
    def vocab_size(self) -> int: ...


@runtime_checkable
class DraftObjective(Protocol):
    """Protocol of a draft's training objective; each drafter defines its own classes.

    Attributes:
        draft: the architecture to train from random weights.
        target: a directory that `eagle_jax.load` reads, or the name of a shipped model.
        features: a directory with target features that `python -m eagle_jax.train.features` wrote;
            empty: the target runs in every training step.
    """

    @property
    def draft(self) -> DraftConfig: ...

    @property
    def target(self) -> str: ...

    @property
    def features(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Training text and how it is packed into sequences.

    Attributes:
        train: one or more JSONL files (plain or gzip) of conversations.
        validation: the same for held-out conversations.
        tokenizer: a `tokenizer.json`, or a directory that holds one.
        sequence_length: tokens per packed sequence.
        batch_size: sequences per optimizer step.
        cache_dir: directory of the tokenised text (ArrayRecord files).
        workers: processes that read and pack sequences; 0: the training process does it.
        seed: seed of the shuffle.
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
    """The optimizer: AdamW with linear warm-up.

    Attributes:
        learning_rate: peak learning rate.
        steps: optimizer steps of the whole run.
        warmup_steps: steps in which the learning rate rises linearly from zero.
        schedule: learning rate after the warm-up: "constant", or "cosine" or "linear" decay to
            `final_fraction` of the peak.
        final_fraction: last learning rate divided by the peak.
        b1, b2, eps, weight_decay: AdamW's parameters; weight decay applies to matrices only.
        clip_value: clip each element of the gradient to ± this value (as EAGLE-1's code does);
            None: no clipping.
        clip_norm: clip the gradient's global norm to this value; None: no clipping.
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
    """The objective that trains a target: next-token cross-entropy on assistant tokens.

    Attributes:
        model: the architecture to train from random weights.
    """

    model: TransformerConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The configuration of one training run.

    Attributes:
        output_dir: directory for checkpoints, events, the loss curve and the exported model.
        objective: the model to train and its loss.
        data: the training text.
        optim: the optimizer.
        seed: seed of the initial weights and of training noise.
        compute_dtype: dtype of activations; weights and optimizer state are float32.
        eval_every: steps between validations; 0: no validation.
        eval_batches: batches per validation.
        checkpoint_every: steps between checkpoints.
        keep_checkpoints: number of newest checkpoints to keep.
        export_dtype: dtype of the exported safetensors.
        fsdp: size of an fsdp group, whose devices split one copy of weights and optimizer state and
            each process their own rows of the batch.
        tensor: size of a tensor group, whose devices process the same rows with a part of every
            matrix each.
        expert: size of an expert group, whose devices hold different experts (for a target with
            experts).
        peak_flops: peak FLOP/s of one device, for MFU; 0: look up the device.
        attention: "xla", or "cudnn" for the fused kernel of cuDNN (bfloat16 on a GPU), which takes
            half the time and does not store the attention scores.
        remat: recompute activations in the backward pass, which saves memory and costs time.
        stop_on_spike: stop if the loss exceeds this many times the median of the last 100 steps
            (checked from 20 steps on; 0: never). A loss or gradient that is not finite always stops
            the run.
    """

    output_dir: str
    objective: NextToken | DraftObjective
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
    tensor: int = 1
    expert: int = 1
    peak_flops: float = 0.0
    attention: Literal["xla", "cudnn"] = "xla"
    remat: bool = False
    stop_on_spike: float = 0.0


def __getattr__(name: str) -> Any:
    # Imported on first use, because the drafters' configurations import the classes above.
    from eagle_jax.drafters import registry

    for spec in registry.built_in().values():
        for found in spec.config_classes():
            if found.__name__ == name:
                return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
