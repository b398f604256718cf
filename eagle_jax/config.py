"""Configuration of models, data and training: frozen dataclasses.

`eagle_jax.settings` reads them from Python files, overrides and checks them. The classes of the
drafters (`EagleConfig`, `FeatureRegression`, ...) are defined in `eagle_jax.drafters.<kind>.config`
and imported from here, as any other configuration is.
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
    """How rotary frequencies are stretched for texts longer than those of pre-training.

    Attributes:
        rope_type: "linear" divides every frequency by `factor`; "llama3" the slow ones only, with a
            ramp between; "yarn" (arXiv 2309.00071) ramps over dimensions and sharpens attention.
        factor: by how much the context grows.
        original_max_position_embeddings: context of pre-training, in tokens; not for "linear".
        low_freq_factor, high_freq_factor: "llama3": wavelengths above the original context over the
            first are divided, those below it over the second kept.
        beta_fast, beta_slow: "yarn": turns within the original context that bound the ramp.
        attention_factor: "yarn": multiplies queries and keys; by default 0.1 ln(factor) + 1.
        mscale, mscale_all_dim: "yarn": if both are given, the factor is the quotient of two such
            terms, each with its own weight in place of 1.
        truncate: "yarn": the ramp's bounds are whole dimensions.
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
    """A decoder-only transformer; field names and meanings are Hugging Face's where it has them.

    The defaults are Llama's; `eagle_jax.checkpoint.families` says what other families set.

    Attributes:
        vocab_size: rows of the embedding.
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
        rope_scaling: of the rotary embedding, for long contexts.
        rope_local_base_freq: base of the rotary embedding, unscaled, in sliding layers (Gemma 3);
            by default they have that of the others.
        sliding_window: a token sees itself and the `sliding_window - 1` positions before.
        layer_types: of each layer, whether it has that window; empty: all have it.
        hidden_act: of the gate.
        qk_norm: an RMSNorm on every head of queries and keys (Qwen3, Gemma 3).
        query_pre_attn_scalar: scores are divided by its square root; by default `head_dim`.
        attn_logit_softcapping: scores are bent to stay within ± this: c tanh(x / c).
        final_logit_softcapping: the same for logits.
        post_norms: norms also after attention and after the feed-forward block (Gemma 2 and 3).
        unit_offset_norm: RMSNorm multiplies with 1 + its scale (Gemma).
        scale_embeddings: embeddings are multiplied with the root of `hidden_size` (Gemma).
        num_experts: feed-forward blocks of a layer, among which a router chooses; 0: one, no
            router.
        num_experts_per_tok: how many each token goes through.
        moe_intermediate_size: width of an expert; by default `intermediate_size`.
        norm_topk_prob: the chosen experts' weights add up to 1.
        mlp_only_layers: layers without experts all the same.
        model_type: the family a checkpoint came from, for going back; no part of the computation.
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
    # Not compared: equal computations share compiled programs, whatever file they came from.
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
        """The sliding window of a layer, in positions; None where it sees all of them."""
        sliding = not self.layer_types or self.layer_types[layer] == "sliding_attention"
        return self.sliding_window if sliding else None

    def has_experts(self, layer: int) -> bool:
        """Whether the feed-forward block of a layer is a router and its experts."""
        return self.num_experts > 0 and layer not in self.mlp_only_layers


def check_draft_vocabulary(size: int | None, vocab_size: int) -> None:
    """Raises ValueError if a draft vocabulary has no entry, or more than the target's has."""
    if size is not None and not 1 <= size <= vocab_size:
        raise ValueError(f"draft_vocab_size={size}: must be 1 to vocab_size={vocab_size}")


@runtime_checkable
class DraftConfig(Protocol):
    """The architecture of a draft of any kind; `eagle_jax.drafters.DrafterSpec` says more.

    Attributes:
        kind: names its drafter.
        vocab_size: the target's.
    """

    kind: ClassVar[str]

    @property
    def vocab_size(self) -> int: ...


@runtime_checkable
class DraftObjective(Protocol):
    """The settings of a draft's training; each drafter has classes of its own.

    Attributes:
        draft: the architecture to train from random weights.
        target: a directory that `eagle_jax.load` reads, or the name of a shipped pair.
        features: a directory that `python -m eagle_jax.train.features` wrote; empty: the target
            runs in every step.
    """

    @property
    def draft(self) -> DraftConfig: ...

    @property
    def target(self) -> str: ...

    @property
    def features(self) -> str: ...


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
        fsdp: devices that share one copy of weights and optimizer state, each with rows of its own.
        tensor: devices that work on the same rows, each with a part of every matrix.
        expert: devices that hold different experts of a target that has some.
        peak_flops: of one device, for MFU; 0 looks the device up.
        attention: "xla", or cuDNN's fused kernel: bfloat16 on a GPU, where it takes half the time
            and never holds scores of all pairs of tokens.
        remat: recompute activations in the backward pass, which saves memory for time.
        stop_on_spike: stop at a loss above this many times the median of the last 100 steps, once
            there are 20 (0: never). A loss or gradient that is not finite always stops a run.
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
    # On first use, since the drafters' configurations are made of the classes above.
    from eagle_jax.drafters import registry

    for spec in registry.built_in().values():
        for found in spec.config_classes():
            if found.__name__ == name:
                return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
