"""Adds a product in partial sums to the residual stream, and normalises the result.

XLA needs three launches for one row: a sum, a mean of squares, and a product.
"""

from __future__ import annotations

import functools
import operator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from eagle_jax.models.kernels import device


def fits(x: jax.Array) -> bool:
    """Returns whether `add` can run."""
    return device.usable(x)


@functools.partial(jax.jit, static_argnames=("eps", "unit_offset"))
def add(
    x: Float[Array, "n d"],
    parts: Float[Array, "p n d"],
    scale: Float[Array, " d"],
    eps: float,
    unit_offset: bool,
) -> tuple[Float[Array, "n d"], Float[Array, "n d"]]:
    """Returns `x` plus the sum of `parts`, and the norm of that as `RMSNorm` computes it."""
    (n, d), count = x.shape, len(parts)
    size = pl.next_power_of_2(d)

    def program(x_ref, scale_ref, *refs) -> None:
        parts_refs, (sum_ref, norm_ref) = refs[:count], refs[count:]
        at, inside = pl.ds(0, size), jax.lax.broadcasted_iota(jnp.int32, (size,), 0) < d

        def read(ref) -> jax.Array:
            return triton.load(ref.at[at], mask=inside, other=0)

        factor = read(scale_ref)  # loaded before the mean, which synchronises all threads
        added = functools.reduce(operator.add, map(read, parts_refs))
        # Rounds as a product that is written to memory does.
        total = read(x_ref) + added.astype(x.dtype)
        triton.store(sum_ref.at[at], total, mask=inside)
        whole = total.astype(jnp.float32)
        whole = whole * jax.lax.rsqrt(jnp.sum(whole * whole) / d + eps)
        if unit_offset:
            normed = (whole * (1 + factor.astype(jnp.float32))).astype(x.dtype)
        else:
            normed = whole.astype(x.dtype) * factor
        triton.store(norm_ref.at[at], normed, mask=inside)

    def of_part(part: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, d), lambda i: (part, i, 0))

    of_row = pl.BlockSpec((None, d), lambda i: (i, 0))
    total, normed = pl.pallas_call(
        program,
        grid=(n,),
        in_specs=[of_row, pl.BlockSpec((d,), lambda _: (0,)), *map(of_part, range(count))],
        out_specs=[of_row, of_row],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype)] * 2,
        compiler_params=triton.CompilerParams(num_warps=16 if size > 2048 else 4),
        interpret=device.INTERPRET,
        name="norm",
    )(x, scale, *[parts] * count)
    return total, normed
