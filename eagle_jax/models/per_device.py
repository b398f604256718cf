"""Runs parts of a pass on each device of a mesh separately, so that our kernels can run there.

XLA cannot partition our kernels over a mesh. So each device gets its own rows, heads, feed-forward
columns and vocabulary entries. Partial sums over heads or columns are all-reduced twice a layer
(`matmul.all_reduced`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from eagle_jax import sharding
from eagle_jax.models import kernels
from eagle_jax.models.cache import AXES
from eagle_jax.sharding import Logical

# Leading logical axes of activations and of caches.
ROWS: Logical = ("batch",)
CACHE: Logical = AXES


def per_device(
    function: Callable[..., Any],
    modules: Mapping[str, nnx.Module],
    args: tuple[Any, ...],
    results: tuple[Logical, ...],
    *,
    possible: bool = True,
    **sizes: int,
) -> Any:
    """Returns `function(modules, *args)`, run on each device if only the mesh prevents kernels.

    Args:
        function: reads no other arrays; its arguments may be a device's parts.
        modules: the modules that it calls, by the prefix of their weights' names.
        args: trees of arrays; the first is one array of activations. Each tree is split by rows,
            and trees of keys and values [b, k, s, e] also by heads.
        results: leading logical axes of the arrays of each result.
        possible: whether each device can run `function` by itself; this needs the "xla" attention
            and no experts on other devices.
        sizes: sizes of logical axes that are part of a weight's axis.
    """
    if not (possible and kernels.usable_per_device(args[0])):
        return function(modules, *args)
    graph, state = nnx.split(dict(modules))
    flat = {".".join(map(str, path)): (path, leaf) for path, leaf in nnx.to_flat_state(state)}
    weights = {name: leaf.get_value() for name, (_, leaf) in flat.items()}

    def local(weights: dict[str, Any], *args: Any) -> Any:
        own = [(path, leaf.replace(weights[name])) for name, (path, leaf) in flat.items()]
        return function(nnx.merge(graph, nnx.from_flat_state(own)), *args)

    axes = tuple(map(_axes, args))
    return sharding.on_each_device(local, args, axes, results, weights=weights, sizes=sizes)


def _axes(arg: Any) -> Logical:
    """Returns the logical axes of an argument; only keys and values have four axes."""
    return CACHE if any(leaf.ndim == 4 for leaf in jax.tree.leaves(arg)) else ROWS
