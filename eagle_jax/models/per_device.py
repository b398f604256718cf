"""Parts of a pass that every device of a mesh runs by itself, so that our kernels run there.

XLA does not cut our kernels over a mesh. So each device gets its own rows, heads, feed-forward
columns and vocabulary entries; where it holds only part of a sum over heads or columns, it adds
what the others have (`matmul.all_reduced`), twice a layer.
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
    """Returns `function(modules, *args)`, run by each device where only the mesh forbids kernels.

    Args:
        function: reads no other arrays; the arrays that it gets may be a device's parts.
        modules: whose weights it reads, by the names that theirs begin with.
        args: trees of arrays; the first is one array of activations. Each tree is cut by rows, and
            one of keys and values [b, k, s, e] by heads too.
        results: leading logical axes of the arrays of each result.
        possible: whether each device can run `function` by itself: attention is the usual one
            ("xla"), and no experts are on other devices.
        sizes: of logical axes that lie within an axis of weights.
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
    """The logical axes of an argument: keys and values are the only arrays of four axes."""
    return CACHE if any(leaf.ndim == 4 for leaf in jax.tree.leaves(arg)) else ROWS
