"""A whole transformer in a Hugging Face directory: a target, or an independent draft model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eagle_jax.checkpoint import families, files
from eagle_jax.checkpoint.lazy_tensor import LazyTensor, equal
from eagle_jax.checkpoint.names import Shape, module_shapes, renamed_leaf
from eagle_jax.config import TransformerConfig
from eagle_jax.layout import Layout


def shapes(config: TransformerConfig) -> dict[str, Shape]:
    """The name and the shape of every weight of a transformer's files."""
    return dict(_shapes(config))


@functools.lru_cache(maxsize=64)
def _shapes(config: TransformerConfig) -> dict[str, Shape]:
    # One layer of each kind stands for all like it: Flax takes 50 ms for every layer of a module,
    # and 20 ms for every expert.
    found: dict[bool, dict[str, Shape]] = {}
    result: dict[str, Shape] = {}
    for index in range(config.num_hidden_layers):
        experts = config.has_experts(index)
        if experts not in found:
            found[experts] = dict(_one_layer(config, experts))
        result |= {
            name.replace("layers.0.", f"layers.{index}.", 1): shape
            for name, shape in found[experts].items()
        }
    return result


def _one_layer(config: TransformerConfig, experts: bool) -> Iterator[tuple[str, Shape]]:
    """Names and shapes of the same transformer with one layer, with experts or without."""
    from eagle_jax.models import Transformer  # imports JAX

    changes: dict[str, Any] = {"num_hidden_layers": 1, "layer_types": (), "mlp_only_layers": ()}
    if not experts:
        changes |= {"num_experts": 0, "num_experts_per_tok": 0}
    config = dataclasses.replace(config, **changes)
    if not experts:
        yield from module_shapes(Transformer, config).items()
        return
    # All experts in one stack, but for their own matrices, which one expert tells.
    single = dataclasses.replace(config, num_experts=1, num_experts_per_tok=1)
    for name, shape in module_shapes(Transformer, config, Layout(gate_up_fused=True)).items():
        if ".experts." not in name:
            yield name, shape
    for name, shape in module_shapes(Transformer, single).items():
        if ".experts.0." in name:
            for expert in range(config.num_experts):
                yield name.replace(".experts.0.", f".experts.{expert}."), shape


def disk_name(config: TransformerConfig, name: str) -> tuple[str, bool]:
    """The name on disk of a weight, and whether it is transposed there; families have own words."""
    disk, transposed = renamed_leaf(name)
    if not name.startswith("lm_head."):
        disk = f"model.{disk}"
    for ours, theirs in _renames(config).items():
        disk = disk.replace(ours, theirs)
    return disk, transposed


@functools.lru_cache(maxsize=64)
def _renames(config: TransformerConfig) -> Mapping[str, str]:
    return families.FAMILIES[families.family_of(config)].renames


def settings(
    config: TransformerConfig,
    dtype: str,
    bos_token_id: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
) -> dict[str, Any]:
    """The content of `config.json`, as transformers reads it."""
    return families.to_json(config, families.family_of(config), dtype) | {
        "num_hidden_layers": config.num_hidden_layers,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        # Written even when null: transformers would otherwise take Llama-2's 1 and 2.
        "bos_token_id": bos_token_id,
        "eos_token_id": list(eos_token_id) if isinstance(eos_token_id, Sequence) else eos_token_id,
    }


def read(
    directory: Path, settings: Mapping[str, Any], tensors: files.LazyTensors
) -> tuple[TransformerConfig, files.LazyTensors]:
    """Configuration and weights by their Flax names.

    Raises:
        ValueError: a key or a tensor is missing, unexpected, wrong or not supported.
    """
    counts = ("num_hidden_layers", "num_experts", "num_local_experts")
    files.check_counts(directory, settings, counts, tensors)
    config = families.from_json(directory, settings)
    tied = ["lm_head.weight"] if config.tie_word_embeddings else []
    head, embedding = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    if tied and head is not None and embedding is not None and not equal(head, embedding):
        # transformers ties no head that a file has and that differs.
        config, tied = dataclasses.replace(config, tie_word_embeddings=False), []
    return config, files.arrays(directory, config, tensors, *tied)


def untied(
    config: TransformerConfig, params: Mapping[str, LazyTensor]
) -> tuple[TransformerConfig, Mapping[str, LazyTensor]]:
    """The same model with a head of its own, if its embedding was the head.

    On CPUs a head stored [d, v] multiplies a few rows twice as fast as the [v, d] embedding. A
    quantised head is a copy anyway, since embeddings stay as they are.
    """
    if not config.tie_word_embeddings:
        return config, params
    embedding = params["embed_tokens.embedding"]
    head = LazyTensor(
        embedding.shape[::-1],
        embedding.dtype,
        lambda: np.ascontiguousarray(np.asarray(embedding).T),
    )
    config = dataclasses.replace(config, tie_word_embeddings=False)
    return config, {**params, "lm_head.kernel": head}
