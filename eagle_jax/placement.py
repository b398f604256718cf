"""Places weights on devices, sharded over a mesh, in the layout that decodes fastest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding

from eagle_jax.checkpoint.lazy_tensor import LazyTensor
from eagle_jax.config import DraftConfig
from eagle_jax.drafters import registry
from eagle_jax.layout import Layout
from eagle_jax.models import kernels, param_names
from eagle_jax.models import quantize as quantisation
from eagle_jax.models.weight_layout import fuse, fused_parts
from eagle_jax.sharding import check_tensor, replicated, weight_shardings
from eagle_jax.types import ParamDict


def layout_for_decoding(dtype: jnp.dtype, quantize: Literal["int8"] | None = None) -> Layout:
    """Returns the layout that is fastest to decode with.

    The q, k and v projections are fused only where our GPU kernels read them: compiled for TPUs,
    the fused matrix would make a round with a tree a sixth slower (docs/tpu.md).
    """
    return Layout(gate_up_fused=True, qkv_fused=kernels.expected(dtype), quantize=quantize)


def place(
    params: Mapping[str, LazyTensor],
    config: DraftConfig,
    layout: Layout,
    dtype: jnp.dtype,
    sharding: Mesh | Sharding | None,
) -> ParamDict:
    """Reads, casts and places arrays one by one, and returns them in `layout`.

    Args:
        params: the weights in their files.
        config: configuration of the model.
        layout: layout of the result.
        dtype: dtype of all weights that are not quantised.
        sharding: where the weights are placed, as in `load`.
    """
    scales: frozenset[str] = frozenset()  # the module defines which matrices become int8
    if layout.quantize is not None:
        module = registry.by_config(config).module_class()
        names_there = param_names(module, config, layout)
        scales = frozenset(name for name in names_there if name.endswith(quantisation.SCALE))
    placed = {}
    for parts in fused_parts(params, layout).values():
        names = [name for joined in parts for name in joined]
        read = {name: np.asarray(params[name]) for name in names}
        for name, array in fuse(read, config, layout).items():
            small = name + quantisation.SCALE in scales
            # Tables of token ids stay integers; matrices to quantise keep the file's precision.
            if not small and not np.issubdtype(array.dtype, np.integer):
                array = array.astype(dtype, copy=False)
            placed[name] = jax.device_put(array, _sharding(name, array, sharding))
            if small:
                placed |= _quantised(name, placed[name], sharding)
            # Wait, so that the host frees this copy before it reads the next array.
            jax.block_until_ready(placed[name])
    return placed


def _quantised(name: str, kernel: jax.Array, sharding: Mesh | Sharding | None) -> ParamDict:
    """Returns the int8 matrix and its scales, computed on the devices that hold the matrix."""
    names, axis = (name, name + quantisation.SCALE), quantisation.input_axis(name)
    shapes = jax.eval_shape(lambda x: quantisation.quantize(x, axis), kernel)
    where: Any = sharding
    if isinstance(sharding, Mesh):
        places = weight_shardings(sharding, dict(zip(names, shapes, strict=True)), stored=False)
        where = tuple(places[name] for name in names)
    run = jax.jit(quantisation.quantize, static_argnames="axis", out_shardings=where)
    return dict(zip(names, run(kernel, axis=axis), strict=True))


def draft_place(config: DraftConfig, sharding: Mesh | Sharding | None) -> Mesh | Sharding | None:
    """Returns where to place a draft: replicated if the mesh does not divide it."""
    if isinstance(sharding, Mesh):
        try:
            check_tensor(sharding, [config])
        except ValueError:
            return replicated(sharding)
    return sharding


def _sharding(name: str, array: np.ndarray, sharding: Mesh | Sharding | None) -> Sharding | None:
    if not isinstance(sharding, Mesh):
        return sharding
    if np.issubdtype(array.dtype, np.integer):
        return replicated(sharding)
    leaf = {name: jax.ShapeDtypeStruct(array.shape, array.dtype)}
    return weight_shardings(sharding, leaf, stored=False)[name]
