"""Parts of a pass that each device of a mesh does by itself, so that kernels of our own run there.

A device has its own rows, heads, feed-forward columns and vocabulary entries. What it finds of a
sum over heads or columns it adds to what the others found (`linear.over_group`), twice a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from eagle_jax import sharding
from eagle_jax.models import kernels
from eagle_jax.sharding import Logical


def per_device(
    function: Callable[..., Any],
    modules: Mapping[str, nnx.Module],
    args: tuple[Any, ...],
    axes: tuple[Logical, ...],
    results: tuple[Logical, ...],
    *,
    possible: bool = True,
    **sizes: int,
) -> Any:
    """`function(modules, *args)`; where kernels could run but for the mesh, on each of its devices.

    Args:
        function: reads no other arrays; arrays within it may be parts.
        modules: what it reads weights of, by the names that begin theirs.
        args: trees of arrays; the first is one, of activations.
        axes, results: leading logical axes of the arrays of each argument and result.
        possible: whether each device can do `function` by itself: its attention is the plain one
            ("xla"), no experts are elsewhere.
        sizes: of logical axes that lie within an axis of weights.
    """
    if not (possible and kernels.usable_apart(args[0])):
        return function(modules, *args)
    graph, state = nnx.split(dict(modules))
    flat = {".".join(map(str, path)): (path, leaf) for path, leaf in nnx.to_flat_state(state)}
    weights = {name: leaf.get_value() for name, (_, leaf) in flat.items()}

    def local(weights: dict[str, Any], *args: Any) -> Any:
        own = [(path, leaf.replace(weights[name])) for name, (path, leaf) in flat.items()]
        return function(nnx.merge(graph, nnx.from_flat_state(own)), *args)

    return sharding.on_each_device(local, args, axes, results, weights=weights, sizes=sizes)
