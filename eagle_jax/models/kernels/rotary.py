"""Splits a fused projection into rotated queries and keys, and values."""

from __future__ import annotations

import functools
import operator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Float32

from eagle_jax.models.kernels import device


def fits(x: jax.Array, head_dim: int) -> bool:
    """Returns whether `split` can run."""
    return device.usable(x) and head_dim >= 2 and head_dim & (head_dim - 1) == 0


@functools.partial(jax.jit, static_argnames=("heads", "dtype"))
def split(
    parts: Float32[Array, "p n o"],
    cos: Float32[Array, "b t f"],
    sin: Float32[Array, "b t f"],
    heads: tuple[int, ...],
    dtype: jnp.dtype,
) -> tuple[Float[Array, "b k q e"], Float[Array, "b k t e"], Float[Array, "b k t e"]]:
    """Returns queries by key head (token by token, its g heads in order), keys and values.

    Args:
        parts: partial sums of the product with a kernel [d, k (g + 2) e].
        cos, sin: cosines and sines of every token's angles.
        heads: k, g + 2, e; the g queries of a key head come before its key and its value.
        dtype: dtype of the results.
    """
    (b, t, half), (k, both, e) = cos.shape, heads
    g, rows, count = both - 2, pl.next_power_of_2(both), len(parts)

    def program(cos_ref, sin_ref, *refs) -> None:
        parts_refs, (query_ref, key_ref, value_ref) = refs[:count], refs[count:]
        row = jax.lax.broadcasted_iota(jnp.int32, (rows, half), 0)
        there = row < both

        def read(first: int) -> jax.Array:
            where = pl.ds(0, rows), pl.ds(first, half)
            parts = [triton.load(ref.at[where], mask=there, other=0) for ref in parts_refs]
            total = functools.reduce(operator.add, parts)
            # Rounds as a product that is written to memory does.
            return total.astype(dtype).astype(jnp.float32)

        left, right = read(0), read(half)
        cosine, sine = (jnp.broadcast_to(ref[...][None], left.shape) for ref in (cos_ref, sin_ref))
        turned = left * cosine - right * sine, right * cosine + left * sine
        for i, (value, new) in enumerate(zip((left, right), turned, strict=True)):
            at = pl.ds(i * half, half)
            triton.store(query_ref.at[pl.ds(0, rows), at], new.astype(dtype), mask=row < g)
            # Key and value are one row each; the sums select it.
            key_ref[at] = jnp.sum(jnp.where(row == g, new, 0), axis=0).astype(dtype)
            value_ref[at] = jnp.sum(jnp.where(row == g + 1, value, 0), axis=0).astype(dtype)

    def of_part(part: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, None, both, e), lambda i, j: (part, i, j, 0, 0))

    turn = pl.BlockSpec((None, None, half), lambda i, j: (i // t, i % t, 0))
    one = pl.BlockSpec((None, None, None, e), lambda i, j: (i // t, j, i % t, 0))
    query, keys, values = pl.pallas_call(
        program,
        grid=(b * t, k),
        in_specs=[turn, turn, *map(of_part, range(count))],
        out_specs=[pl.BlockSpec((None, None, g, e), lambda i, j: (i // t, j, i % t, 0)), one, one],
        out_shape=[jax.ShapeDtypeStruct((b, k, size, e), dtype) for size in (t * g, t, t)],
        compiler_params=triton.CompilerParams(num_warps=1),
        interpret=device.INTERPRET,
        name="rotary",
    )(cos, sin, *[parts.reshape(count, b * t, k, both, e)] * count)
    return query, keys, values
