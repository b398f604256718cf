"""Finds the k largest entries of each row, and the row's logsumexp.

Each program finds the largest entries of a chunk, one after the other. Then one program per row
finds the largest among the chunks' results. XLA would sort the row.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float32, Int32

from eagle_jax.models.kernels import device

_CHUNK = 1024
_MOST = 16  # the largest k; each entry takes one iteration
_NOWHERE = 2**31 - 1


def fits(scores: jax.Array, k: int) -> bool:
    """Returns whether `largest` can run (over a mesh, on each device): float32 and a small k."""
    here = device.usable() or device.usable_per_device()
    return here and scores.dtype == jnp.float32 and k <= min(_MOST, scores.shape[-1])


@functools.partial(jax.jit, static_argnames="k")
def largest(
    scores: Float32[Array, "n v"], k: int
) -> tuple[Float32[Array, "n k"], Int32[Array, "n k"], Float32[Array, " n"]]:
    """Returns the k largest of each row as `lax.top_k` does, and the row's logsumexp.

    Among equal values the lowest index comes first. A NaN counts as the smallest value.
    """
    n, vocab = scores.shape
    chunks, kept = pl.cdiv(vocab, _CHUNK), pl.next_power_of_2(k)
    size = min(_CHUNK, pl.next_power_of_2(vocab))

    def of_chunk(scores_ref, best_ref, index_ref, top_ref, total_ref) -> None:
        first = pl.program_id(1) * size
        at = first + jax.lax.broadcasted_iota(jnp.int32, (size,), 0)
        values = triton.load(scores_ref.at[pl.ds(first, size)], mask=at < vocab, other=-jnp.inf)
        values = jnp.where(values == values, values, -jnp.inf)
        best_ref[...], index_ref[...] = _search(values, at, k, kept)
        top = jnp.max(values)
        # Subtracting 0 for a chunk of only -inf makes its sum 0 instead of NaN.
        total = jnp.sum(jnp.exp(values - jnp.where(top == -jnp.inf, 0.0, top)))
        top_ref[0], total_ref[0] = top, total

    best, index, top, total = _call(
        of_chunk,
        grid=(n, chunks),
        in_specs=[pl.BlockSpec((None, vocab), lambda i, _: (i, 0))],
        out_specs=[
            pl.BlockSpec((None, None, size), lambda i, c: (i, c, 0)) for size in (kept, kept, 1, 1)
        ],
        out_shape=_results((n, chunks), kept),
    )(scores)
    best, index, top, total = (x.reshape(n, -1) for x in (best, index, top, total))
    if chunks > 1:
        found = best.shape[1]

        def some(ref, count: int, other: Any) -> jax.Array:
            wide = pl.next_power_of_2(count)
            here = jax.lax.broadcasted_iota(jnp.int32, (wide,), 0) < count
            return triton.load(ref.at[pl.ds(0, wide)], mask=here, other=other)

        def of_row(values_ref, places_ref, tops_ref, totals_ref, *out_refs) -> None:
            best_ref, index_ref, top_ref, total_ref = out_refs
            values, places = some(values_ref, found, -jnp.inf), some(places_ref, found, _NOWHERE)
            best_ref[...], index_ref[...] = _search(values, places, k, kept)
            tops, totals = some(tops_ref, chunks, -jnp.inf), some(totals_ref, chunks, 0.0)
            top = jnp.max(tops)
            shares = jnp.exp(tops - jnp.where(top == -jnp.inf, 0.0, top))
            top_ref[0], total_ref[0] = top, jnp.sum(totals * shares)

        best, index, top, total = _call(
            of_row,
            grid=(n,),
            in_specs=[
                pl.BlockSpec((None, size), lambda i: (i, 0))
                for size in (found, found, chunks, chunks)
            ],
            out_specs=[pl.BlockSpec((None, size), lambda i: (i, 0)) for size in (kept, kept, 1, 1)],
            out_shape=_results((n,), kept),
        )(best, index, top, total)
    return best[:, :k], index[:, :k], top[:, 0] + jnp.log(total[:, 0])


def _results(lead: tuple[int, ...], kept: int) -> list[jax.ShapeDtypeStruct]:
    """Returns the outputs' shapes: best values, indices, maximum, and sum of exponentials."""
    sizes = ((kept, jnp.float32), (kept, jnp.int32), (1, jnp.float32), (1, jnp.float32))
    return [jax.ShapeDtypeStruct((*lead, size), dtype) for size, dtype in sizes]


def _search(values: jax.Array, places: jax.Array, k: int, kept: int) -> tuple[jax.Array, jax.Array]:
    """Returns the k largest values and their places, ordered by falling value, then by place."""
    slot = jax.lax.broadcasted_iota(jnp.int32, (kept,), 0)

    def turn(i, carry):
        best, index, last, at = carry
        left = (values < last) | ((values == last) & (places > at))
        last = jnp.max(jnp.where(left, values, -jnp.inf))
        at = jnp.min(jnp.where(left & (values == last), places, _NOWHERE))
        here = slot == i
        return jnp.where(here, last, best), jnp.where(here, at, index), last, at

    best = jnp.full((kept,), -jnp.inf, jnp.float32)
    index = jnp.full((kept,), _NOWHERE, jnp.int32)
    carry = best, index, jnp.float32(jnp.inf), jnp.int32(-1)
    best, index, _, _ = jax.lax.fori_loop(jnp.int32(0), jnp.int32(k), turn, carry)
    return best, index


def _call(program: Any, **shapes: Any) -> Any:
    return pl.pallas_call(
        program,
        compiler_params=triton.CompilerParams(num_warps=4),
        interpret=device.INTERPRET,
        name="top",
        **shapes,
    )
