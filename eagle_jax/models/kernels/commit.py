"""Writes accepted tokens' keys and values into all layers' caches, in place, in one launch.

XLA needs a gather and a write for each array of each layer: two launches of a microsecond or two,
about a hundred times per round.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from eagle_jax.models.kernels import device

# A launch takes three pointers per array, and at most 4 KiB for all of its arguments.
_ARRAYS = 96


def fits(cache: Sequence[jax.Array]) -> bool:
    """Returns whether `commit` can run; over a mesh, on each of its devices."""
    e = cache[0].shape[-1]
    same = all(x.shape == cache[0].shape for x in cache)
    here = device.usable(*cache) or device.usable_per_device(*cache)
    return here and same and e & (e - 1) == 0


def commit(
    cache: Sequence[Float[Array, "b k s e"]],
    block: Sequence[Float[Array, "b k t e"]],
    path: Int[Array, "b n"],
    start: Int[Array, " b"],
) -> list[Float[Array, "b k s e"]]:
    """Writes entries `path` of each row's block to slots `start .. start + n - 1` of its cache."""
    out: list[jax.Array] = []
    for at in range(0, len(cache), _ARRAYS):
        out += _commit(cache[at : at + _ARRAYS], block[at : at + _ARRAYS], path, start)
    return out


def _commit(
    cache: Sequence[jax.Array], block: Sequence[jax.Array], path: jax.Array, start: jax.Array
) -> list[jax.Array]:
    (_, k, slots, e), fresh, n = cache[0].shape, block[0].shape[2], path.shape[1]
    rows, count = pl.next_power_of_2(n), len(cache)

    def program(path_ref, start_ref, *refs) -> None:
        blocks, written = refs[:count], refs[2 * count :]  # the caches between them are not read
        step = jax.lax.broadcasted_iota(jnp.int32, (rows,), 0)
        nodes = triton.load(path_ref.at[pl.ds(0, rows)], mask=step < n, other=0)
        column = jax.lax.broadcasted_iota(jnp.int32, (rows, e), 1)
        node = jnp.broadcast_to(nodes[:, None], column.shape)
        inside = jax.lax.broadcasted_iota(jnp.int32, column.shape, 0) < n
        at = pl.ds(start_ref[0], rows)
        for source, place in zip(blocks, written, strict=True):
            values = triton.load(source.at[node, column], mask=inside, other=0)
            triton.store(place.at[at, :], values, mask=inside)

    def of_head(size: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, size, e), lambda i: (i // k, i % k, 0, 0))

    caches = [of_head(slots)] * count
    written = pl.pallas_call(
        program,
        grid=(path.shape[0] * k,),
        in_specs=[
            pl.BlockSpec((None, n), lambda i: (i // k, 0)),
            pl.BlockSpec((1,), lambda i: (i // k,)),
            *([of_head(fresh)] * count),
            *caches,
        ],
        out_specs=caches,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in cache],
        input_output_aliases={2 + count + i: i for i in range(count)},
        compiler_params=triton.CompilerParams(num_warps=4),
        interpret=device.INTERPRET,
        name="commit",
    )(path, start, *block, *cache)
    return list(written)
