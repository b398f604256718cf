"""Names and shapes of a model's parameters, in memory and on disk.

In memory, parameters are a flat dictionary of Flax names: `layers.0.mlp.up_proj.kernel`, laid out
`[in, out]`. On disk a kernel is called `weight` and is transposed. Names of a transformer have the
prefix `model.`, those of EAGLE drafts have none, and Medusa counts: head, block. Some families have
their own words for parts (`families.Family.renames`).
"""

from __future__ import annotations

import re

from eagle_jax.checkpoint.families import FAMILIES, family_of
from eagle_jax.config import DraftConfig, Eagle3Config, EagleConfig, MedusaConfig, TransformerConfig

Shape = tuple[int, ...]

LEAVES = {
    "kernel": ("weight", True),
    "embedding": ("weight", False),
    "scale": ("weight", False),
    "bias": ("bias", False),
}
"""Flax leaf -> its name on disk, and whether it is transposed there."""


def shapes(config: DraftConfig) -> dict[str, Shape]:
    """The name and the shape of every parameter that a configuration implies.

    They are those of files and of training: every expert and every projection is an array.
    A draft's `d2t` is among them, though it is a table of ids and no weight. An EAGLE-1 draft's
    `lm_head.kernel` is not: it is columns of the target's head.
    """
    if isinstance(config, EagleConfig):
        return _eagle(config)
    if isinstance(config, Eagle3Config):
        return _eagle3(config)
    if isinstance(config, MedusaConfig):
        return _medusa(config)
    return _transformer(config)


def on_disk(config: DraftConfig) -> dict[str, tuple[str, bool]]:
    """Every weight's name on disk by its Flax name, and whether it is transposed there."""
    renames = {}
    if isinstance(config, TransformerConfig):
        renames = FAMILIES[family_of(config)].renames
    result = {}
    for name in shapes(config):
        if name != "d2t":
            disk, transposed = _disk_name(config, name)
            for ours, theirs in renames.items():
                disk = disk.replace(ours, theirs)
            result[name] = disk, transposed
    return result


def disk_shapes(config: DraftConfig) -> dict[str, Shape]:
    """The shape of every weight by its name on disk."""
    expected = shapes(config)
    return {
        disk: expected[name][::-1] if transposed else expected[name]
        for name, (disk, transposed) in on_disk(config).items()
    }


def _disk_name(config: DraftConfig, name: str) -> tuple[str, bool]:
    stem, leaf = name.rsplit(".", 1)
    leaf, transposed = LEAVES[leaf]
    if isinstance(config, MedusaConfig):
        # One list per head: its blocks, then its vocabulary head.
        stem = stem.removeprefix("heads.").replace(".lm_head", f".{config.num_layers}")
        stem = re.sub(r"\.blocks\.", ".", stem)
    elif isinstance(config, TransformerConfig) and stem != "lm_head":
        stem = f"model.{stem}"
    return f"{stem}.{leaf}", transposed


def _transformer(config: TransformerConfig) -> dict[str, Shape]:
    d, v = config.hidden_size, config.vocab_size
    result: dict[str, Shape] = {"embed_tokens.embedding": (v, d)}
    for index in range(config.num_hidden_layers):
        prefix = f"layers.{index}."
        result |= _layer(config, prefix)
        if config.has_experts(index):
            result |= _experts(config, f"{prefix}mlp.")
            for name in ("gate", "up", "down"):
                del result[f"{prefix}mlp.{name}_proj.kernel"]
        result |= _further_norms(config, prefix)
    result["norm.scale"] = (d,)
    if not config.tie_word_embeddings:
        result["lm_head.kernel"] = (d, v)
    return result


def _experts(config: TransformerConfig, prefix: str) -> dict[str, Shape]:
    d, f = config.hidden_size, config.moe_intermediate_size or config.intermediate_size
    result: dict[str, Shape] = {f"{prefix}gate.kernel": (d, config.num_experts)}
    for expert in range(config.num_experts):
        for name, shape in (("gate", (d, f)), ("up", (d, f)), ("down", (f, d))):
            result[f"{prefix}experts.{expert}.{name}_proj.kernel"] = shape
    return result


def _further_norms(config: TransformerConfig, prefix: str) -> dict[str, Shape]:
    d, e = config.hidden_size, config.head_dim
    result: dict[str, Shape] = {}
    if config.qk_norm:
        result |= {f"{prefix}self_attn.{name}_norm.scale": (e,) for name in "qk"}
    if config.post_norms:
        result |= {f"{prefix}{name}_feedforward_layernorm.scale": (d,) for name in ("pre", "post")}
    return result


def _eagle(config: EagleConfig) -> dict[str, Shape]:
    d = config.hidden_size
    result: dict[str, Shape] = {"fc.kernel": (2 * d, d)}
    if config.bias:
        result["fc.bias"] = (d,)
    result |= _layer(config, "layers.0.")
    del result["layers.0.input_layernorm.scale"]  # the features come in as they are
    if config.draft_vocab_size is not None:
        result["d2t"] = (config.draft_vocab_size,)
    return result


def _eagle3(config: Eagle3Config) -> dict[str, Shape]:
    d, v, fused = config.hidden_size, config.draft_vocab_size, len(config.aux_layers)
    wide = config.feature_size
    result: dict[str, Shape] = {}
    if wide != d:
        result["embed_tokens.embedding"] = (config.vocab_size, d)
    if config.fc_norm:
        result |= {f"fc_norm.{index}.scale": (wide,) for index in range(fused)}
    result["fc.kernel"] = (fused * wide, d)
    # Attention reads embedding and state side by side.
    result |= _layer(config, "midlayer.", inputs=2)
    return result | {
        "midlayer.hidden_norm.scale": (d,),
        "norm.scale": (d,),
        "lm_head.kernel": (d, v),
        "d2t": (v,),
    }


def _medusa(config: MedusaConfig) -> dict[str, Shape]:
    d, v = config.hidden_size, config.vocab_size
    result: dict[str, Shape] = {}
    for head in range(config.num_heads):
        for block in range(config.num_layers):
            result[f"heads.{head}.blocks.{block}.linear.kernel"] = (d, d)
            result[f"heads.{head}.blocks.{block}.linear.bias"] = (d,)
        if config.tie_lm_head:
            result[f"heads.{head}.lm_proj.kernel"] = (d, d)
        else:
            result[f"heads.{head}.lm_head.kernel"] = (d, v)
    return result


def _layer(
    config: TransformerConfig | EagleConfig | Eagle3Config, prefix: str, inputs: int = 1
) -> dict[str, Shape]:
    d, f, e = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    result: dict[str, Shape] = {}
    for name, width in (("q", heads * e), ("k", kv_heads * e), ("v", kv_heads * e)):
        result[f"self_attn.{name}_proj.kernel"] = (inputs * d, width)
        if config.attention_bias:
            result[f"self_attn.{name}_proj.bias"] = (width,)
    result |= {
        "self_attn.o_proj.kernel": (heads * e, d),
        "mlp.gate_proj.kernel": (d, f),
        "mlp.up_proj.kernel": (d, f),
        "mlp.down_proj.kernel": (f, d),
        "input_layernorm.scale": (d,),
        "post_attention_layernorm.scale": (d,),
    }
    return {prefix + name: shape for name, shape in result.items()}
