"""The table of model families: what each Hugging Face model type implies for a configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from eagle_jax.config import TransformerConfig

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Family:
    """The meaning of one `model_type` of `config.json`.

    Attributes:
        architecture: name of the class in transformers.
        flags: fields of `TransformerConfig` that the family fixes and has no key for.
        keys: fields that the family can set, with their keys in `config.json`; fields of other
            families must have their defaults.
        defaults: values of keys that `config.json` may leave out.
        fixed: keys that must be absent, null or have this value, because any other value changes
            the computation.
        extra: further keys to write.
        windows: returns whether a layer has the sliding window if `layer_types` is absent, from the
            keys and the layer's index. None: all layers have it.
        aliases: other names that some writers use for keys.
        switch: `sliding_window` applies only if `use_sliding_window` is true.
        renames: parts of our tensors' names, mapped to those on disk.
    """

    architecture: str
    flags: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    windows: Callable[[Mapping[str, Any], int], bool] | None = None
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    switch: bool = False
    renames: Mapping[str, str] = dataclasses.field(default_factory=dict)


def after_max_window_layers(settings: Mapping[str, Any], layer: int) -> bool:
    """Returns whether a layer has the window by Qwen2's rule: from `max_window_layers` on."""
    return layer >= count(settings, "max_window_layers", 28)


def _every_other(settings: Mapping[str, Any], layer: int) -> bool:
    del settings
    return layer % 2 == 0


def _all_but_every_sixth(settings: Mapping[str, Any], layer: int) -> bool:
    pattern = count(settings, "sliding_window_pattern", 6)
    if pattern < 1:
        raise ValueError(f"sliding_window_pattern={pattern}: must be at least 1")
    return (layer + 1) % pattern != 0


def count(settings: Mapping[str, Any], key: str, default: int) -> int:
    """Returns the number of layers that `config.json` gives under a key.

    Raises:
        ValueError: the value is not a number of layers.
    """
    value = settings.get(key, default)
    if type(value) is not int or value < 0:
        raise ValueError(f"{key}={value!r}: must be a number of layers")
    return value


_SILU = {"hidden_act": "silu"}
_WINDOW = {"sliding_window": "sliding_window"}
_WINDOWS = _WINDOW | {"layer_types": "layer_types"}
_QWEN_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
}
_GEMMA = {
    "hidden_act": "gelu_pytorch_tanh",
    "post_norms": True,
    "unit_offset_norm": True,
    "scale_embeddings": True,
}
_GEMMA_KEYS = _WINDOWS | {
    "query_pre_attn_scalar": "query_pre_attn_scalar",
    "final_logit_softcapping": "final_logit_softcapping",
}
_GEMMA_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
_GEMMA_FIXED = {
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "use_bidirectional_attention": False,
}

FAMILIES = {
    # Vicuna and every Llama.
    "llama": Family(
        architecture="LlamaForCausalLM",
        defaults={"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
        # transformers' `attention_bias` for Llama also adds a bias to o_proj, which we don't have.
        fixed=_SILU | {"attention_bias": False, "mlp_bias": False},
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        keys=_WINDOW,
        defaults={
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
        },
        fixed=_SILU,
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        flags={"attention_bias": True},
        keys=_WINDOWS,
        defaults=_QWEN_DEFAULTS,
        fixed=_SILU,
        windows=after_max_window_layers,
        switch=True,
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        flags={"qk_norm": True},
        keys=_WINDOWS,
        defaults=_QWEN_DEFAULTS | {"head_dim": 128},
        fixed=_SILU | {"attention_bias": False},
        windows=after_max_window_layers,
        switch=True,
    ),
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        flags={"norm_topk_prob": True},
        keys=_WINDOW
        | {"num_experts": "num_local_experts", "num_experts_per_tok": "num_experts_per_tok"},
        defaults={
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "rope_theta": 1e6,
        },
        fixed=_SILU,
        # Names of an expert's matrices on disk: the expert computes w2(silu(w1(x)) * w3(x)).
        renames={
            ".mlp.": ".block_sparse_moe.",
            ".gate_proj.": ".w1.",
            ".down_proj.": ".w2.",
            ".up_proj.": ".w3.",
        },
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        flags={"qk_norm": True},
        keys=_WINDOW
        | {
            "num_experts": "num_experts",
            "num_experts_per_tok": "num_experts_per_tok",
            "moe_intermediate_size": "moe_intermediate_size",
            "norm_topk_prob": "norm_topk_prob",
            "mlp_only_layers": "mlp_only_layers",
        },
        defaults=_QWEN_DEFAULTS
        | {
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
        },
        fixed=_SILU | {"attention_bias": False},
        extra={"decoder_sparse_step": 1},
        aliases={"num_experts": "num_local_experts"},  # as transformers 5 writes it
        switch=True,
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        flags=_GEMMA,
        keys=_GEMMA_KEYS | {"attn_logit_softcapping": "attn_logit_softcapping"},
        defaults=_GEMMA_DEFAULTS
        | {
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        fixed=_GEMMA_FIXED,
        extra={"hidden_activation": "gelu_pytorch_tanh"},
        windows=_every_other,
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        flags=_GEMMA | {"qk_norm": True},
        keys=_GEMMA_KEYS | {"rope_local_base_freq": "rope_local_base_freq"},
        defaults=_GEMMA_DEFAULTS
        | {
            "max_position_embeddings": 131072,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
        },
        # transformers defines this key but never reads it.
        fixed=_GEMMA_FIXED | {"attn_logit_softcapping": None},
        extra={"hidden_activation": "gelu_pytorch_tanh"},
        windows=_all_but_every_sixth,
    ),
}
"""Every `model_type` that can be read.

A model that names none of them, such as one that was trained here, is written as the first that
fits (`family_of`). So a new family stands at the end: in front, it would take the place of another.
"""

# Fields of a decoder layer that have the same key in every family and in one-layer drafts.
LAYER = {
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_theta",
    "vocab_size",
}
# Fields that every family has.
COMMON = LAYER | {"rope_scaling", "num_hidden_layers", "max_position_embeddings"}
COMMON |= {"tie_word_embeddings", "model_type"}


def family_of(config: TransformerConfig) -> str:
    """Returns the model type that can express `config`: its own, or else the first that fits.

    Raises:
        ValueError: no family can; the message names what the closest one lacks.
    """
    own = [config.model_type] if config.model_type in FAMILIES else []
    unmet = {name: _unmet(config, FAMILIES[name]) for name in [*own, *FAMILIES]}
    name = min(unmet, key=lambda name: len(unmet[name]))
    if unmet[name]:
        field = unmet[name][0]
        raise ValueError(
            f"{field}={getattr(config, field)!r}: no model type has this together with the other "
            f"settings (closest: {name!r}); known: {', '.join(FAMILIES)}"
        )
    return name


def _unmet(config: TransformerConfig, family: Family) -> list[str]:
    """Returns the fields whose values this family's `config.json` cannot express."""
    unmet = []
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        if name in COMMON or name in family.keys:
            continue
        if name == "norm_topk_prob" and not config.num_experts:
            continue  # nothing to normalise
        if value != family.flags.get(name, field.default):
            unmet.append(name)
    if ("num_experts" in family.keys) != (config.num_experts > 0):
        unmet.append("num_experts")
    if "rope_local_base_freq" in family.keys and config.rope_local_base_freq is None:
        unmet.append("rope_local_base_freq")
    return unmet
