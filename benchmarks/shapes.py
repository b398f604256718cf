"""Shapes of well-known models, and random models of these shapes, generated on the device."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import common  # before JAX, because it sets how much memory JAX reserves
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, Sharding

from eagle_jax import sharding
from eagle_jax.config import (
    DraftConfig,
    Eagle3Config,
    EagleConfig,
    MedusaConfig,
    TransformerConfig,
)
from eagle_jax.decode import Medusa
from eagle_jax.drafters import registry
from eagle_jax.layout import PLAIN, Layout
from eagle_jax.models import Transformer, param_shapes
from eagle_jax.models.quantize import checked
from eagle_jax.params import Draft, Params
from eagle_jax.placement import draft_place, layout_for_decoding
from eagle_jax.types import ParamDict

_DRAFT_VOCABULARY = 32000  # the size in published EAGLE-3 heads


def _llama(
    hidden: int, layers: int, heads: int, kv: int, ffn: int, vocab: int, theta: float = 1e4
) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=hidden // heads,
        rope_theta=theta,
        max_position_embeddings=2**16,
    )


# TinyLlama 1.1B, Llama-2 7B, Llama-3 8B, Llama-2 13B, Llama-3 70B.
SHAPES = {
    "tiny": _llama(64, 2, 4, 2, 96, 256),
    "1b": _llama(2048, 22, 32, 4, 5632, 32000),
    "7b": _llama(4096, 32, 32, 32, 11008, 32000),
    "8b": _llama(4096, 32, 32, 8, 14336, 128256, 5e5),
    "13b": _llama(5120, 40, 40, 40, 13824, 32000),
    "70b": _llama(8192, 80, 64, 8, 28672, 128256, 5e5),
}
# Independent small models with the same vocabulary: Llama-160M's shape, Llama-3.2 1B's.
_LLAMA3_1B = _llama(2048, 16, 32, 8, 8192, 128256, 5e5)
_SMALL = {"tiny": _llama(32, 1, 2, 2, 48, 256), "8b": _LLAMA3_1B, "70b": _LLAMA3_1B}
_SMALL_OTHERWISE = _llama(768, 12, 12, 12, 3072, 32000)


def draft_configs(shape: str, draft_vocabulary: int | None = None) -> dict[str, DraftConfig]:
    """Returns a draft configuration of every kind for a target of `shape`, with published widths.

    Raises:
        ValueError: EAGLE-1's draft vocabulary is larger than the target's.
    """
    target = SHAPES[shape]
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
    names += ("num_key_value_heads", "head_dim", "rope_theta")
    own = {name: getattr(target, name) for name in names}
    layers, vocab = target.num_hidden_layers, target.vocab_size
    drafts = (
        EagleConfig(**own, draft_vocab_size=draft_vocabulary),
        Eagle3Config(
            **own,
            draft_vocab_size=min(_DRAFT_VOCABULARY, vocab),
            aux_layers=(2, layers // 2, layers - 3) if layers > 5 else (0, 1, layers),
        ),
        MedusaConfig(vocab, target.hidden_size, num_heads=Medusa().depth),
        _SMALL.get(shape, _SMALL_OTHERWISE),
    )
    return {draft.kind: draft for draft in drafts}


def draw(
    key: jax.Array,
    shape: tuple[int, ...],
    mean: float,
    std: float,
    dtype: Any,
    place: Sharding | None = None,
) -> jax.Array:
    """Returns normal (int8: uniform) random numbers; every device generates its own part."""
    return _drawing(shape, mean, std, dtype, place)(key)


@functools.cache
def _drawing(
    shape: tuple[int, ...], mean: float, std: float, dtype: Any, place: Sharding | None
) -> Callable[[jax.Array], jax.Array]:
    def made(key: jax.Array) -> jax.Array:
        if dtype == jnp.int8:
            return jax.random.randint(key, shape, -127, 128, jnp.int8)
        return (mean + std * jax.random.normal(key, shape)).astype(dtype)

    return jax.jit(made, out_shardings=place)


def random_weights(
    cls: Callable[..., nnx.Module],
    config: Hashable,
    seed: int = 0,
    dtype: Any = None,
    where: Mesh | Sharding | None = None,
    layout: Layout = PLAIN,
) -> ParamDict:
    """Returns random weights, generated on the device array by array (seconds for 7B).

    Matrices have unit gain, so that nothing overflows, and are not zeros, with which products run
    faster. `where` is the `sharding` of `load`.
    """
    like = param_shapes(cls, config, layout)
    dtype = dtype or common.default_dtype()
    places: dict[str, Any] = dict.fromkeys(like, where)
    if isinstance(where, Mesh):
        places = sharding.weight_shardings(where, like, stored=False)
    keys = jax.random.split(jax.random.key(seed), len(like))
    out = {}
    for key, name in zip(keys, sorted(like), strict=True):
        shape, kernel = like[name].shape, like.get(name.removesuffix("_scale"))
        made = functools.partial(draw, key, shape, place=places[name])
        if like[name].dtype == jnp.int8:
            out[name] = made(0.0, 0.0, jnp.int8)
        elif jnp.issubdtype(like[name].dtype, jnp.integer):  # the table of a draft vocabulary
            table = offsets(getattr(config, "vocab_size", 0), *shape)
            out[name] = jax.device_put(table, places[name])
        elif kernel is not None and kernel.dtype == jnp.int8:  # scales stay float32
            std = (3 / kernel.shape[-1]) ** 0.5 / 127
            out[name] = made(std, 0.1 * std, jnp.float32)
        elif len(shape) == 1:
            out[name] = made(float(name.endswith("scale")), 0.1, dtype)
        else:
            std = 1.0 if name.endswith("embedding") else shape[0] ** -0.5
            out[name] = made(0.0, std, dtype)
    return jax.block_until_ready(out)


def of_one_device(weights: ParamDict) -> ParamDict:
    """Returns the parts of the weights that the first device holds."""
    return {name: x.addressable_shards[0].data for name, x in weights.items()}


def offsets(vocab: int, size: int) -> np.ndarray:
    """Returns the table `d2t` of a draft vocabulary that is spread evenly over the target's."""
    index = np.arange(size, dtype=np.int32)
    return index * (vocab // size) - index


def random_params(
    shape: str,
    kinds: Sequence[str] = (),
    quantize: str | None = None,
    draft_vocabulary: int | None = None,
    layers: int | None = None,
    mesh: Mesh | None = None,
    quantize_drafts: str | None = None,
) -> Params:
    """Returns a random target of `shape` with drafts of these kinds, placed as `load` does.

    Raises:
        ValueError: the quantisation is unknown, the model has fewer layers than `layers`, the mesh
            does not divide the target, or as in `draft_configs`.
    """
    quantization = checked("--quantize", quantize)
    of_drafts = checked("--quantize-drafts", quantize_drafts)
    target, dtype = SHAPES[shape], jnp.dtype(common.default_dtype())
    if mesh is not None:
        sharding.check_tensor(mesh, [target])
    if layers is not None:
        most, least = target.num_hidden_layers, 2 if "eagle3" in kinds else 1
        if not least <= layers <= most:
            raise ValueError(f"--layers {layers}: shape {shape} has {most}; use {least} to {most}")
        target = dataclasses.replace(target, num_hidden_layers=layers)
    drafts, layout = {}, layout_for_decoding(dtype, of_drafts)
    for kind in kinds:
        config = draft_configs(shape, draft_vocabulary)[kind]
        if isinstance(config, Eagle3Config) and layers is not None:
            config = dataclasses.replace(config, aux_layers=(0, layers // 2, layers))
        if of_drafts is not None and isinstance(config, EagleConfig):  # gets a head, as in `load`
            own = config.draft_vocab_size or config.vocab_size
            config = dataclasses.replace(config, draft_vocab_size=own)
        place = draft_place(config, mesh)
        weights = random_weights(
            registry.by_kind(kind).module_class(), config, 1, where=place, layout=layout
        )
        drafts[kind] = Draft(weights, config, layout)
    layout = layout_for_decoding(dtype, quantization)
    weights = random_weights(Transformer, target, where=mesh, layout=layout)
    return Params(weights, drafts, target, layout)
