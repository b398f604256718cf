"""A whole transformer (target or independent draft model) in a Hugging Face directory."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eagle_jax.checkpoint import config_json, families, files
from eagle_jax.checkpoint.lazy_tensor import LazyTensor, equal
from eagle_jax.checkpoint.names import Shape, module_shapes, renamed_leaf
from eagle_jax.config import TransformerConfig
from eagle_jax.layout import Layout


def shapes(config: TransformerConfig) -> dict[str, Shape]:
    """Returns name and shape of every weight in a transformer's files."""
    return dict(_shapes(config))


@functools.lru_cache(maxsize=64)
def _shapes(config: TransformerConfig) -> dict[str, Shape]:
    # Shapes are computed for one layer of each kind, because Flax takes 50 ms for every layer of a
    # module and 20 ms for every expert.
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
    """Yields names and shapes of the transformer with one layer only, with experts or without."""
    from eagle_jax.models import Transformer  # imports JAX

    changes: dict[str, Any] = {"num_hidden_layers": 1, "layer_types": (), "mlp_only_layers": ()}
    if not experts:
        changes |= {"num_experts": 0, "num_experts_per_tok": 0}
    config = dataclasses.replace(config, **changes)
    if not experts:
        yield from module_shapes(Transformer, config).items()
        return
    # The module stacks all experts; the files have one matrix per expert, of one expert's shape.
    single = dataclasses.replace(config, num_experts=1, num_experts_per_tok=1)
    for name, shape in module_shapes(Transformer, config, Layout(gate_up_fused=True)).items():
        if ".experts." not in name:
            yield name, shape
    for name, shape in module_shapes(Transformer, single).items():
        if ".experts.0." in name:
            for expert in range(config.num_experts):
                yield name.replace(".experts.0.", f".experts.{expert}."), shape


def disk_name(config: TransformerConfig, name: str) -> tuple[str, bool]:
    """Returns a weight's name on disk in its family, and whether it is transposed there."""
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
    """Returns the content of `config.json` as transformers reads it."""
    return config_json.to_json(config, families.family_of(config), dtype) | {
        "num_hidden_layers": config.num_hidden_layers,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        # Written even if null, since transformers would otherwise assume Llama-2's ids 1 and 2.
        "bos_token_id": bos_token_id,
        "eos_token_id": list(eos_token_id) if isinstance(eos_token_id, Sequence) else eos_token_id,
    }


def read(
    directory: Path, settings: Mapping[str, Any], tensors: files.LazyTensors
) -> tuple[TransformerConfig, files.LazyTensors]:
    """Returns the configuration and the weights by Flax name.

    Raises:
        ValueError: a key or a tensor is missing, unexpected, wrong or not supported.
    """
    counts = ("num_hidden_layers", "num_experts", "num_local_experts")
    files.check_counts(directory, settings, counts, tensors)
    config = config_json.from_json(directory, settings)
    tied = ["lm_head.weight"] if config.tie_word_embeddings else []
    head, embedding = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    if tied and head is not None and embedding is not None and not equal(head, embedding):
        # Like transformers, do not tie a head that the file contains and that differs.
        config, tied = dataclasses.replace(config, tie_word_embeddings=False), []
    return config, files.arrays(directory, config, tensors, *tied)


def untied(
    config: TransformerConfig, params: Mapping[str, LazyTensor]
) -> tuple[TransformerConfig, Mapping[str, LazyTensor]]:
    """Returns the same model with a separate head if its head was tied to the embedding.

    On CPUs a head stored as [d, v] multiplies a few rows twice as fast as the [v, d] embedding. A
    quantised head is a copy anyway, since embeddings are not quantised.
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
