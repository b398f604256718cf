"""NNX modules as pure functions of a flat parameter dictionary.

A module is described once per configuration (`nnx.split` of its abstract form); `bind` merges
parameters into it inside a traced function. Modules hold parameters only: caches and masks are
arguments and results.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import jax.numpy as jnp
from flax import nnx

from eagle_jax.models.quantize import SCALE
from eagle_jax.types import ParamDict

Module = TypeVar("Module", bound=nnx.Module)


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in path)


@functools.cache
def _skeleton(cls: Callable[..., nnx.Module], config: Hashable) -> tuple[Any, tuple[Any, ...]]:
    """Graph definition and parameter paths of `cls(config)`, made without allocating arrays."""
    graph, state = nnx.split(nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0))))
    return graph, tuple(path for path, _ in nnx.to_flat_state(state))


def bind(cls: Callable[..., Module], config: Hashable, params: ParamDict) -> Module:
    """The module `cls(config)` holding `params`; call it inside a jitted function.

    Its arithmetic runs in the dtype of the parameters.
    """
    graph, paths = _skeleton(cls, config)
    flat = [(path, nnx.Param(params[_name(path)])) for path in paths]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def param_shapes(cls: Callable[..., nnx.Module], config: Hashable) -> dict[str, Any]:
    """Shape and dtype of every parameter and table of `cls(config)`."""
    state = nnx.state(nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0))))
    return {_name(path): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def init_params(cls: Callable[..., nnx.Module], config: Hashable, seed: int) -> ParamDict:
    """Random float32 parameters of `cls(config)`, the same for the same seed on every platform."""
    module = cls(config, rngs=nnx.Rngs(seed))
    state = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {_name(path): leaf[...] for path, leaf in state}


def cast(params: ParamDict, dtype: Any) -> ParamDict:
    """`params` with every floating array in `dtype`, but for scales of int8 matrices."""
    return {
        name: x.astype(dtype)
        if jnp.issubdtype(x.dtype, jnp.floating) and not name.endswith(f".kernel{SCALE}")
        else x
        for name, x in params.items()
    }
