"""NNX modules as pure functions of a flat parameter dictionary.

A module is described once per configuration and layout (`nnx.split` of its abstract form); `bind`
merges parameters into it inside a traced function. Modules hold parameters only: caches and masks
are arguments and results.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import jax.numpy as jnp
from flax import nnx

from eagle_jax.layout import PLAIN, Layout
from eagle_jax.models.quantize import SCALE
from eagle_jax.types import ParamDict

Module = TypeVar("Module", bound=nnx.Module)


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in path)


@functools.cache
def _skeleton(
    cls: Callable[..., nnx.Module], config: Hashable, layout: Layout
) -> tuple[Any, tuple[Any, ...]]:
    """Returns a module's graph definition and parameter paths, without allocating arrays."""
    graph, state = nnx.split(nnx.eval_shape(lambda: cls(config, layout, rngs=nnx.Rngs(0))))
    return graph, tuple(path for path, _ in nnx.to_flat_state(state))


def bind(
    cls: Callable[..., Module], config: Hashable, params: ParamDict, layout: Layout = PLAIN
) -> Module:
    """Returns the module `cls(config, layout)` with `params`; call it inside a jitted function.

    Its arithmetic runs in the dtype of the parameters.
    """
    graph, paths = _skeleton(cls, config, layout)
    flat = [(path, nnx.Param(params[_name(path)])) for path in paths]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def param_names(
    cls: Callable[..., nnx.Module], config: Hashable, layout: Layout = PLAIN
) -> frozenset[str]:
    """Returns the names of all parameters and tables of `cls(config, layout)`."""
    return frozenset(_name(path) for path in _skeleton(cls, config, layout)[1])


def param_shapes(
    cls: Callable[..., nnx.Module], config: Hashable, layout: Layout = PLAIN
) -> dict[str, Any]:
    """Returns shape and dtype of every parameter and table of `cls(config, layout)`."""
    state = nnx.state(nnx.eval_shape(lambda: cls(config, layout, rngs=nnx.Rngs(0))))
    return {_name(path): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def init_params(
    cls: Callable[..., nnx.Module], config: Hashable, seed: int, layout: Layout = PLAIN
) -> ParamDict:
    """Returns random parameters of `cls(config, layout)`; a seed gives the same on any platform.

    They are float32, except for the int8 matrices of a quantised layout.
    """
    module = cls(config, layout, rngs=nnx.Rngs(seed))
    state = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {_name(path): leaf[...] for path, leaf in state}


def cast(params: ParamDict, dtype: Any) -> ParamDict:
    """Returns `params` with all floating arrays in `dtype`, except scales of int8 matrices."""
    return {
        name: x.astype(dtype)
        if jnp.issubdtype(x.dtype, jnp.floating) and not name.endswith(f".kernel{SCALE}")
        else x
        for name, x in params.items()
    }
