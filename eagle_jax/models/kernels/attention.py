"""Attention of a few tokens over a long cache and over each other, in one pass over both.

A program owns a key head, some of its query rows and a part of the used slots, which it walks
through with a running maximum and sum; slots that are not used are not read. The part that comes
last takes the fresh tokens. A second launch joins the parts.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Bool, Float, Float32, Int

from eagle_jax.models.kernels import device
from eagle_jax.types import KeyValue

_MOST = 128  # fresh tokens
_ROWS = (16, 64)  # query rows of a program: a tensor core multiplies at least 16
_NOTHING = -1e30  # below any score; no infinity, which minus itself is no number


@dataclasses.dataclass(frozen=True)
class Tile:
    """How the work is cut: query rows a program, slots a step, parts of the used slots."""

    rows: int
    slots: int
    parts: int
    warps: int = 4
    stages: int = 2


def tile(rows: int, slots: int, heads: int) -> Tile:
    """The cut for so many query rows of each of `heads` key heads (of all texts)."""
    size = next((size for size in _ROWS if size >= rows), _ROWS[-1])
    programs, parts = heads * -(-rows // size), 1
    while programs * parts < 200 and parts < 16:
        parts *= 2
    return Tile(size, min(64, slots), parts)


def fits(query: jax.Array, prefix: KeyValue) -> bool:
    """Whether `attend` can do it: few tokens, sizes that a tensor core takes."""
    slots, e = prefix[0].shape[2:]
    sizes = e >= 16 and (e & (e - 1)) == 0 and slots % 16 == 0
    return device.usable(query, *prefix) and query.shape[1] <= _MOST and sizes


@functools.partial(jax.jit, static_argnames=("tokens", "scale", "softcap", "cut"))
def attend(
    query: Float[Array, "b k q e"],
    block: KeyValue,
    mask: Bool[Array, "b q u"],
    prefix: KeyValue,
    lengths: Int[Array, " b"],
    oldest: Int[Array, "b q"] | None,
    tokens: int,
    scale: float,
    softcap: float | None,
    cut: Tile | None = None,
) -> Float[Array, "b t h e"]:
    """As `two_segment_attention`, for queries grouped by key head (`kernels.rotary.split`).

    Args:
        query: unscaled; q = t g rows of each key head, a token's g heads in order.
        block, prefix, lengths, softcap: as there.
        mask: query row -> block token.
        oldest: the first prefix slot that each query row sees; None: the first of all.
        tokens: t.
        scale: of the scores.
        cut: by default that of `tile`.
    """
    (b, k, q, e), slots, fresh = query.shape, prefix[0].shape[2], block[0].shape[2]
    cut = cut or tile(q, slots, b * k)
    step = math.gcd(cut.slots, slots)
    span = min(64, max(16, pl.next_power_of_2(fresh)))  # fresh tokens a step
    spans, last = -(-fresh // span), cut.parts

    def program(query_ref, keys_ref, values_ref, lengths_ref, *rest) -> None:
        oldest_ref, rest = (None, rest) if oldest is None else (rest[0], rest[1:])
        fresh_keys_ref, fresh_values_ref, mask_ref, mixed_ref, largest_ref, total_ref = rest
        first, part = pl.program_id(1) * cut.rows, pl.program_id(2)
        length = lengths_ref[0]

        def iota(shape: tuple[int, ...], axis: int) -> jax.Array:
            return jax.lax.broadcasted_iota(jnp.int32, shape, axis)

        rows = pl.ds(first, cut.rows)
        own = first + iota((cut.rows, e), 0) < q
        mine = triton.load(query_ref.at[rows, :], mask=own, other=0)
        edge = None
        if oldest_ref is not None:
            edge = triton.load(oldest_ref.at[rows], mask=first + iota((cut.rows,), 0) < q, other=0)

        def add(carry, keys, values, seen):
            mixed, largest, total = carry
            scores = jnp.dot(mine, keys.T, preferred_element_type=jnp.float32) * scale
            if softcap is not None:  # tanh by exp: exact enough for either sign
                scores = softcap * (1 - 2 / (jnp.exp(2 * scores / softcap) + 1))
            scores = jnp.where(seen, scores, -jnp.inf)
            new = jnp.maximum(largest, jnp.max(scores, axis=1))
            weights, old = jnp.exp(scores - new[:, None]), jnp.exp(largest - new)
            more = jnp.dot(weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
            total = total * old + jnp.sum(weights, axis=1)
            return mixed * old[:, None] + more, new, total

        def cached(i, carry):
            at, slot = pl.ds(i * step, step), i * step + iota((cut.rows, step), 1)
            seen = slot < length
            if edge is not None:
                seen = seen & (slot >= edge[:, None])
            return add(carry, keys_ref[at, :], values_ref[at, :], seen)

        def drafted(i, carry):
            at = pl.ds(i * span, span)
            there = i * span + iota((span, e), 0) < fresh
            keys = triton.load(fresh_keys_ref.at[at, :], mask=there, other=0)
            values = triton.load(fresh_values_ref.at[at, :], mask=there, other=0)
            shape = (cut.rows, span)
            inside = (first + iota(shape, 0) < q) & (i * span + iota(shape, 1) < fresh)
            seen = triton.load(mask_ref.at[rows, at], mask=inside, other=0)
            return add(carry, keys, values, seen > 0)

        carry = (
            jnp.zeros((cut.rows, e), jnp.float32),
            jnp.full((cut.rows,), _NOTHING, jnp.float32),
            jnp.zeros((cut.rows,), jnp.float32),
        )
        steps = (length + step - 1) // step
        each = (steps + cut.parts - 1) // cut.parts
        end = jnp.minimum((part + 1) * each, steps)
        carry = jax.lax.fori_loop(part * each, end, cached, carry)
        # Of int32 as it stands: Triton's loops want bounds of one type.
        turns = (part == last).astype(jnp.int32) * spans
        mixed, largest, total = jax.lax.fori_loop(jnp.int32(0), turns, drafted, carry)
        triton.store(mixed_ref.at[rows, :], mixed, mask=own)
        inside = first + iota((cut.rows,), 0) < q
        triton.store(largest_ref.at[rows], largest, mask=inside)
        triton.store(total_ref.at[rows], total, mask=inside)

    def of_head(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, None, *shape), lambda i, *_: (i // k, i % k, *(0 for _ in shape))
        )

    def of_row(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, *shape), lambda i, *_: (i // k, *(0 for _ in shape)))

    def of_part(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, None, None, *shape),
            lambda i, _, part: (part, i // k, i % k, *(0 for _ in shape)),
        )

    edges = [] if oldest is None else [(oldest, of_row(q))]
    mixed, largest, total = pl.pallas_call(
        program,
        grid=(b * k, -(-q // cut.rows), cut.parts + 1),
        in_specs=[
            of_head(q, e),
            of_head(slots, e),
            of_head(slots, e),
            pl.BlockSpec((1,), lambda i, *_: (i // k,)),
            *(spec for _, spec in edges),
            of_head(fresh, e),
            of_head(fresh, e),
            of_row(q, fresh),
        ],
        out_specs=[of_part(q, e), of_part(q), of_part(q)],
        out_shape=[
            jax.ShapeDtypeStruct((cut.parts + 1, b, k, *shape), jnp.float32)
            for shape in ((q, e), (q,), (q,))
        ],
        compiler_params=triton.CompilerParams(num_warps=cut.warps, num_stages=cut.stages),
        interpret=device.INTERPRET,
        name="attention",
    )(query, *prefix, lengths, *(array for array, _ in edges), *block, mask.astype(jnp.int8))
    return _join(mixed, largest, total, tokens, query.dtype)


def _join(
    mixed: Float32[Array, "p b k q e"],
    largest: Float32[Array, "p b k q"],
    total: Float32[Array, "p b k q"],
    t: int,
    dtype: jnp.dtype,
) -> Float[Array, "b t h e"]:
    """What all parts found together, by tokens and heads."""
    count, b, k, q, e = mixed.shape
    g, rows = q // t, min(16, pl.next_power_of_2(q))

    def program(*refs) -> None:
        mixed_refs, largest_refs, total_refs = (refs[i * count : (i + 1) * count] for i in range(3))
        out_ref = refs[-1]
        first, head = pl.program_id(1) * rows, pl.program_id(0) % k
        row = first + jax.lax.broadcasted_iota(jnp.int32, (rows,), 0)
        line = first + jax.lax.broadcasted_iota(jnp.int32, (rows, e), 0)
        at, inside = pl.ds(first, rows), row < q

        def read(ref) -> jax.Array:
            return triton.load(ref.at[at], mask=inside, other=0)

        tops = [read(ref) for ref in largest_refs]
        top = functools.reduce(jnp.maximum, tops)
        weighted, weight = jnp.zeros((rows, e), jnp.float32), jnp.zeros((rows,), jnp.float32)
        for own, mixed_ref, total_ref in zip(tops, mixed_refs, total_refs, strict=True):
            share = jnp.exp(own - top)
            weight = weight + read(total_ref) * share
            more = triton.load(mixed_ref.at[at, :], mask=line < q, other=0)
            weighted = weighted + more * share[:, None]
        out = (weighted / jnp.where(inside, weight, 1)[:, None]).astype(dtype)
        column = jax.lax.broadcasted_iota(jnp.int32, (rows, e), 1)
        triton.store(out_ref.at[line // g, head * g + line % g, column], out, mask=line < q)

    def of_part(part: int, *shape: int) -> pl.BlockSpec:
        rest = (0,) * len(shape)
        return pl.BlockSpec((None, None, None, *shape), lambda i, _: (part, i // k, i % k, *rest))

    shapes = ((q, e), (q,), (q,))
    return pl.pallas_call(
        program,
        grid=(b * k, -(-q // rows)),
        in_specs=[of_part(part, *shape) for shape in shapes for part in range(count)],
        out_specs=pl.BlockSpec((None, t, k * g, e), lambda i, _: (i // k, 0, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((b, t, k * g, e), dtype),
        compiler_params=triton.CompilerParams(num_warps=2),
        interpret=device.INTERPRET,
        name="attention_join",
    )(*[mixed] * count, *[largest] * count, *[total] * count)
