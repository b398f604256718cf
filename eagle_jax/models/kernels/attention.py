"""Attention of a few tokens over a long cache and over each other, in one pass over both.

A program handles one key head, some of its query rows and a part of the used slots. It walks
through the slots with a running maximum and sum, and does not read unused slots. The last part also
takes the fresh tokens. A second launch joins the parts.

With very few rows, every program makes queries and fresh keys itself from the fused projection
(`UnsplitHeads`), which saves a launch.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Bool, Float, Float32, Int

from eagle_jax.models.kernels import device
from eagle_jax.types import KeyValue

_MOST = 128  # the most fresh tokens
_ROWS = (16, 64)  # query rows of a program; a tensor core multiplies at least 16
_SPLIT = 8  # the most query rows for which programs split the fused projection themselves
_NOTHING = -1e30  # below any score, but finite: inf - inf would be NaN


@dataclasses.dataclass(frozen=True)
class Tile:
    """The tiling: query rows per program, slots per step, parts of the used slots."""

    rows: int
    slots: int
    parts: int
    warps: int = 4
    stages: int = 2


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["parts", "cos", "sin"],
    meta_fields=["heads", "dtype"],
)
@dataclasses.dataclass(frozen=True)
class UnsplitHeads:
    """The arguments of `rotary.split`: a fused projection that is not split yet."""

    parts: Float32[Array, "p n o"]
    cos: Float32[Array, "b t f"]
    sin: Float32[Array, "b t f"]
    heads: tuple[int, ...]
    dtype: jnp.dtype

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape (b, k, q, e) of the queries."""
        (b, t, _), (k, both, e) = self.cos.shape, self.heads
        return b, k, t * (both - 2), e


def tile(rows: int, slots: int, heads: int) -> Tile:
    """Returns the tile for `rows` query rows of each of `heads` key heads (of all batch rows)."""
    size = next((size for size in _ROWS if size >= rows), _ROWS[-1])
    programs, parts = heads * -(-rows // size), 1
    while programs * parts < 200 and parts < 16:
        parts *= 2
    return Tile(size, min(64, slots), parts)


def fits(query: jax.Array, prefix: KeyValue) -> bool:
    """Returns whether `attend` can run: few tokens, and sizes that a tensor core takes."""
    return device.usable(query) and query.shape[1] <= _MOST and _reads(prefix)


def splits(joined: UnsplitHeads, prefix: KeyValue) -> bool:
    """Returns whether `attend` can take a fused projection; this needs few rows."""
    return joined.shape[2] <= _SPLIT and _reads(prefix)


def _reads(prefix: KeyValue) -> bool:
    slots, e = prefix[0].shape[2:]
    return device.usable(*prefix) and e >= 16 and (e & (e - 1)) == 0 and slots % 16 == 0


@functools.partial(jax.jit, static_argnames=("tokens", "scale", "softcap", "cut"))
def attend(
    query: Float[Array, "b k q e"] | UnsplitHeads,
    block: KeyValue | None,
    mask: Bool[Array, "b q u"],
    prefix: KeyValue,
    lengths: Int[Array, " b"],
    oldest: Int[Array, "b q"] | None,
    tokens: int,
    scale: float,
    softcap: float | None,
    cut: Tile | None = None,
) -> tuple[Float[Array, "b t h e"], KeyValue]:
    """Returns `two_segment_attention` of queries grouped by key head (`kernels.rotary.split`).

    Args:
        query: unscaled queries, q = t g rows for each key head, with a token's g heads in order; or
            the fused projection of queries, keys and values, if `splits` accepts it.
        block: keys and values [b, k, u, e] of the fresh tokens; None with a fused projection.
        prefix, lengths, softcap: as in `two_segment_attention`.
        mask: which fresh tokens each query row sees.
        oldest: the first prefix slot that each query row sees; None means slot 0.
        tokens: number of tokens t.
        scale: factor of the scores.
        cut: the tile; by default that of `tile`.

    Returns:
        The attended values, and the block.
    """
    (b, k, q, e), slots = query.shape, prefix[0].shape[2]
    fresh, dtype = tokens if block is None else block[0].shape[2], query.dtype
    cut = cut or tile(q, slots, b * k)
    step = math.gcd(cut.slots, slots)
    span = min(64, max(16, pl.next_power_of_2(fresh)))  # fresh tokens per step
    spans, last = -(-fresh // span), cut.parts

    def program(*refs) -> None:
        ref = dict(zip((*inputs, *outputs), refs, strict=True))
        first, part = pl.program_id(1) * cut.rows, pl.program_id(2)
        length = ref["lengths"][0]

        def iota(shape: tuple[int, ...], axis: int) -> jax.Array:
            return jax.lax.broadcasted_iota(jnp.int32, shape, axis)

        def read(token: int, head: int, column: jax.Array) -> jax.Array:
            parts = (ref[f"part {i}"][token, head, column] for i in range(count))
            # Rounds as a product that is written to memory does.
            return functools.reduce(operator.add, parts).astype(dtype)

        def turned(token: int, head: int) -> jax.Array:
            """Returns a rotated head as `rotary.split` does; reads its other half again."""
            column = iota((e,), 0)
            own, other = (
                read(token, head, at).astype(jnp.float32) for at in (column, (column + e // 2) % e)
            )
            cos, sin = (ref[name][token, column % (e // 2)] for name in ("cos", "sin"))
            across = jnp.where(column < e // 2, -other, other)
            return (own * cos + across * sin).astype(dtype)

        def stacked(lines: Sequence[jax.Array], size: int) -> jax.Array:
            """Returns [size, e] with the given lines [e] as its first rows."""
            row, whole = iota((size, e), 0), jnp.zeros((size, e), dtype)
            for i, line in enumerate(lines):
                whole = jnp.where(row == i, jnp.broadcast_to(line[None], whole.shape), whole)
            return whole

        rows = pl.ds(first, cut.rows)
        own = first + iota((cut.rows, e), 0) < q
        group = q // tokens
        if isinstance(query, UnsplitHeads):
            mine = stacked([turned(i // group, i % group) for i in range(q)], cut.rows)
        else:
            mine = triton.load(ref["query"].at[rows, :], mask=own, other=0)
        edge = None
        if oldest is not None:
            inside = first + iota((cut.rows,), 0) < q
            edge = triton.load(ref["oldest"].at[rows], mask=inside, other=0)

        def add(carry, keys, values, seen):
            mixed, largest, total = carry
            scores = jnp.dot(mine, keys.T, preferred_element_type=jnp.float32) * scale
            if softcap is not None:  # tanh by exp is accurate enough for both signs
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
            return add(carry, ref["keys"][at, :], ref["values"][at, :], seen)

        def drafted(i, carry):
            at = pl.ds(i * span, span)
            if isinstance(query, UnsplitHeads):
                # Only one program of each key head runs this, so it also writes the new entries.
                new = [(turned(j, group), read(j, group + 1, iota((e,), 0))) for j in range(fresh)]
                for j, pair in enumerate(new):
                    ref["new keys"][j, :], ref["new values"][j, :] = pair
                keys, values = (stacked(lines, span) for lines in zip(*new, strict=True))
            else:
                there = i * span + iota((span, e), 0) < fresh
                keys = triton.load(ref["fresh keys"].at[at, :], mask=there, other=0)
                values = triton.load(ref["fresh values"].at[at, :], mask=there, other=0)
            shape = (cut.rows, span)
            inside = (first + iota(shape, 0) < q) & (i * span + iota(shape, 1) < fresh)
            seen = triton.load(ref["mask"].at[rows, at], mask=inside, other=0)
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
        if isinstance(query, UnsplitHeads):  # a loop would prefetch everything that it reads
            drafts = functools.partial(drafted, 0)
            carry = jax.lax.cond(part == last, drafts, lambda carry: carry, carry)
        else:
            # Triton's loops need bounds of one type, here int32.
            turns = (part == last).astype(jnp.int32) * spans
            carry = jax.lax.fori_loop(jnp.int32(0), turns, drafted, carry)
        mixed, largest, total = carry
        triton.store(ref["mixed"].at[rows, :], mixed, mask=own)
        inside = first + iota((cut.rows,), 0) < q
        triton.store(ref["largest"].at[rows], largest, mask=inside)
        triton.store(ref["total"].at[rows], total, mask=inside)

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

    count, inputs = 0, {}
    if isinstance(query, UnsplitHeads):
        count, both = len(query.parts), query.heads[1]
        by_head = query.parts.reshape(count, b, tokens, k, both, e)
        for i in range(count):
            shape = (None, None, tokens, None, both, e)
            where = functools.partial(lambda i, h, *_: (i, h // k, 0, h % k, 0, 0), i)
            inputs[f"part {i}"] = by_head, pl.BlockSpec(shape, where)
        inputs |= {name: (getattr(query, name), of_row(tokens, e // 2)) for name in ("cos", "sin")}
    else:
        assert block is not None
        inputs["query"] = query, of_head(q, e)
        for name, array in zip(("fresh keys", "fresh values"), block, strict=True):
            inputs[name] = array, of_head(fresh, e)
    inputs["mask"] = mask.astype(jnp.int8), of_row(q, fresh)
    inputs |= {"keys": (prefix[0], of_head(slots, e)), "values": (prefix[1], of_head(slots, e))}
    inputs["lengths"] = lengths, pl.BlockSpec((1,), lambda i, *_: (i // k,))
    if oldest is not None:
        inputs["oldest"] = oldest, of_row(q)
    outputs = {
        name: (jax.ShapeDtypeStruct((cut.parts + 1, b, k, *shape), jnp.float32), of_part(*shape))
        for name, shape in (("mixed", (q, e)), ("largest", (q,)), ("total", (q,)))
    }
    if block is None:
        new = jax.ShapeDtypeStruct((b, k, fresh, e), dtype), of_head(fresh, e)
        outputs |= {"new keys": new, "new values": new}
    found = pl.pallas_call(
        program,
        grid=(b * k, -(-q // cut.rows), cut.parts + 1),
        in_specs=[spec for _, spec in inputs.values()],
        out_specs=[spec for _, spec in outputs.values()],
        out_shape=[shape for shape, _ in outputs.values()],
        compiler_params=triton.CompilerParams(num_warps=cut.warps, num_stages=cut.stages),
        interpret=device.INTERPRET,
        name="attention",
    )(*(array for array, _ in inputs.values()))
    mixed, largest, total, *made = found
    return _join(mixed, largest, total, tokens, dtype), tuple(made) if block is None else block


def _join(
    mixed: Float32[Array, "p b k q e"],
    largest: Float32[Array, "p b k q"],
    total: Float32[Array, "p b k q"],
    t: int,
    dtype: jnp.dtype,
) -> Float[Array, "b t h e"]:
    """Returns the attended values, joined from all parts, by token and head."""
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
