"""Key/value cache: one pair of arrays per layer, written only with committed tokens.

Layers are separate arrays (a stack would be copied by every loop iteration),
laid out [b, k, s, e] so that attention's batched products need no transpose.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from eagle_jax.models import kernels
from eagle_jax.sharding import constrain
from eagle_jax.types import KeyValue

# Per layer (keys, values), each [b, k, s, e].
Cache = tuple[KeyValue, ...]
AXES = ("batch", "heads")  # of those, what a mesh cuts


def empty(
    layers: int, batch: int, heads: int, slots: int, head_dim: int, dtype: jnp.dtype
) -> Cache:
    """A zeroed cache. Zeros, not uninitialised memory: NaN times a masked 0 would still be NaN."""
    shape = (batch, heads, slots, head_dim)
    return tuple(
        constrain((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)), *AXES) for _ in range(layers)
    )


def write(cache: Cache, block: Cache, start: Int[Array, " b"]) -> Cache:
    """Put `block` ([b, k, t, e] per array) into slots `start .. start + t - 1` of each row.

    A row whose slice would pass the end is shifted back by XLA and would corrupt older slots, so
    callers allocate slack (`engine.capacity`).
    """

    def one_row(old: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), at, axis=1)

    written = jax.tree.map(lambda old, new: jax.vmap(one_row)(old, new, start), cache, block)
    return constrain(written, *AXES)


def commit(cache: Cache, block: Cache, path: Int[Array, "b n"], start: Int[Array, " b"]) -> Cache:
    """As `write`, of the entries `path` of each row's block."""
    arrays, structure = jax.tree.flatten(cache)
    if kernels.commit.fits(arrays):
        written = kernels.commit.commit(arrays, jax.tree.leaves(block), path, start)
        return jax.tree.unflatten(structure, written)
    return write(cache, gather(block, path), start)


def gather(block: Cache, index: Int[Array, "b n"]) -> Cache:
    """Entries `index` of each row's block: [b, k, t, e] -> [b, k, n, e]."""
    return jax.tree.map(
        lambda x: jnp.take_along_axis(x, index[:, None, :, None], axis=2, mode="clip"), block
    )
