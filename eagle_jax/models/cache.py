"""The KV cache: one pair of arrays per layer, which receives only committed tokens.

Layers are separate arrays, because each iteration of the decoding loop would copy a stack. The
layout [b, k, s, e] lets attention's batched products run without a transpose.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from eagle_jax.models import kernels
from eagle_jax.sharding import constrain, on_each_device, over_several
from eagle_jax.types import KeyValue

# (keys, values) of each layer, each [b, k, s, e].
Cache = tuple[KeyValue, ...]
AXES = ("batch", "heads")  # logical axes that a mesh can split
_KERNEL_SLOTS = 64  # the most slots that the kernel writes at once


def empty(
    layers: int, batch: int, heads: int, slots: int, head_dim: int, dtype: jnp.dtype
) -> Cache:
    """Returns a cache of zeros, because a NaN in an unused slot would spread despite the mask."""
    shape = (batch, heads, slots, head_dim)
    return tuple(
        constrain((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)), *AXES) for _ in range(layers)
    )


def write(cache: Cache, block: Cache, start: Int[Array, " b"]) -> Cache:
    """Writes `block` ([b, k, t, e] per array) into slots `start .. start + t - 1` of each row.

    XLA moves a slice that would pass the end back over older slots, so callers allocate slack
    (`capacity`).
    """
    t = jax.tree.leaves(block)[0].shape[2]
    every = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32)[None], (start.shape[0], t))
    if t <= _KERNEL_SLOTS and (written := _launched(cache, block, every, start)) is not None:
        return written
    written = jax.tree.map(lambda old, new: place(old, new, start, axis=1), cache, block)
    return constrain(written, *AXES)


def place(
    old: Shaped[Array, "b ..."], new: Shaped[Array, "b ..."], start: Int[Array, " b"], axis: int
) -> Shaped[Array, "b ..."]:
    """Returns `old` with `new` written into each row, from `start` on along `axis` of the row."""

    def one_row(old: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), at, axis)

    if old.shape[0] == 1:  # several rows would become a scatter, which is slower
        return one_row(old[0], new[0], start[0])[None]
    return jax.vmap(one_row)(old, new, start)


def commit(cache: Cache, block: Cache, path: Int[Array, "b n"], start: Int[Array, " b"]) -> Cache:
    """Writes the entries `path` of each row's block, as `write` does with a whole block."""
    written = _launched(cache, block, path, start)
    return write(cache, gather(block, path), start) if written is None else written


def _launched(
    cache: Cache, block: Cache, path: Int[Array, "b n"], start: Int[Array, " b"]
) -> Cache | None:
    """Returns the cache after `commit` by our kernel, or None where the kernel does not fit."""
    arrays, structure = jax.tree.flatten(cache)
    args = (arrays, jax.tree.leaves(block), path, start)
    if not kernels.commit.fits(arrays):
        return None
    if over_several():
        axes = (AXES, AXES, ("batch",), ("batch",))
        written = on_each_device(kernels.commit.commit, args, axes, (AXES,))
    else:
        written = kernels.commit.commit(*args)
    return jax.tree.unflatten(structure, written)


def gather(block: Cache, index: Int[Array, "b n"]) -> Cache:
    """Returns the entries `index` of each row's block: [b, k, t, e] -> [b, k, n, e]."""
    return jax.tree.map(
        lambda x: jnp.take_along_axis(x, index[:, None, :, None], axis=2, mode="clip"), block
    )
