"""Attention of the training-time test: shared real rows, and one chain of drafted rows per row.

At step j, row t attends to the real rows up to t of its segment (keys of step 0) and to its own
keys of steps 1..j, to which no other row attends. Keys of 3 rows at step 2:

              step 0     step 1     step 2
    row 0     x          x          x
    row 1     x x          x          x
    row 2     x x x          x          x

The right part is diagonal: one score per row and step. `causal` computes the left part and also
returns the logarithm of its softmax denominator. `attend` then takes one softmax over that number
and the diagonal scores. The largest array is one chunk of queries by all keys.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from eagle_jax.types import KeyValue

CHUNK = 256
_GROUPS = 8  # groups of chunks; each reads the keys up to its end, so 9/16 of all scores remain
# The name, for `jax.checkpoint_policies.save_only_these_names`, of the results of `causal`.
SAVED = "causal"

Queries = Float[Array, "b k g t e"]
PerQuery = Float[Array, "b k g t"]


def attend(
    query: Float[Array, "b t h e"],
    real: KeyValue,
    chain: Sequence[KeyValue],
    segments: Int[Array, "b t"],
    chunk: int = CHUNK,
) -> Float[Array, "b t h e"]:
    """Returns the attention output of one draft step for every row.

    Args:
        query: queries of the rows at this step.
        real: keys and values [b, k, t, e] of step 0.
        chain: keys and values of steps 1..j; each row attends only to its own.
        segments: segment ids, as in a packed batch.
        chunk: number of queries whose scores are in memory at once.
    """
    b, t, h, e = query.shape
    k = real[0].shape[1]
    rows = query.reshape(b, t, k, h // k, e).transpose(0, 2, 3, 1, 4)
    rows = rows * jnp.asarray(e**-0.5, query.dtype)
    both: Any = causal(rows, *real, segments, chunk)
    mixed, total = both
    if chain:
        own = [jnp.sum(_wide(rows) * _wide(keys)[:, :, None], axis=-1) for keys, _ in chain]
        # Column 0 is the total score of all real rows.
        share = jax.nn.softmax(jnp.stack([total, *own], axis=-1), axis=-1)[..., None, :]
        mixed = share[..., 0] * mixed
        for i, (_, values) in enumerate(chain, start=1):
            mixed += share[..., i] * _wide(values)[:, :, None]
    return mixed.astype(query.dtype).transpose(0, 3, 1, 2, 4).reshape(b, t, h, e)


def _wide(x: Array) -> Array:
    return x.astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def causal(
    query: Queries,
    keys: Float[Array, "b k t e"],
    values: Float[Array, "b k t e"],
    segments: Int[Array, "b t"],
    chunk: int,
) -> tuple[Queries, PerQuery]:
    """Returns causal attention within segments, and its log-sum-exp, float32, for scaled queries.

    The gradient must also flow through the log-sum-exp. JAX's cuDNN attention ignores that part
    (0.10.2 to 0.11.2) and rounds the log-sum-exp to bfloat16, so this module has its own code. The
    backward pass recomputes the scores. Products have the dtype of the inputs and accumulate in
    float32.
    """
    return _forward(query, keys, values, segments, chunk)


def _forward(
    query: Queries, keys: Array, values: Array, segments: Array, chunk: int
) -> tuple[Queries, PerQuery]:
    t = query.shape[3]

    def part(
        keys: Array, values: Array, segments: Array, inputs: tuple[Array, Array, Array]
    ) -> tuple[Array, Array]:
        query, own, index = inputs
        scores = _scores(query, keys, _visible(own, segments, index))
        top = jnp.max(scores, axis=-1, keepdims=True)  # finite, since a row attends to itself
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        mixed = _product("bkgts,bkse->bkgte", weights.astype(values.dtype), values)
        return mixed / total, (top + jnp.log(total))[..., 0]

    found = []
    for first, end in _groups(t, chunk):
        seen = keys[:, :, :end], values[:, :, :end], segments[:, :end]
        rows = _rows(segments, first, end, chunk)
        mixed, total = jax.lax.map(
            functools.partial(part, *seen), (_cut(query[..., first:end, :], 3, chunk), *rows)
        )
        found.append((_join(mixed, 3, end - first), _join(total, 3, end - first)))
    mixed, total = (jnp.concatenate(parts, axis=3) for parts in zip(*found, strict=True))
    return mixed, total


def _causal_forward(
    query: Queries, keys: Array, values: Array, segments: Array, chunk: int
) -> tuple[tuple[Queries, PerQuery], tuple[Array, ...]]:
    mixed, total = (
        checkpoint_name(x, SAVED) for x in _forward(query, keys, values, segments, chunk)
    )
    return (mixed, total), (query, keys, values, segments, mixed, total)


def _causal_backward(
    chunk: int, saved: tuple[Array, ...], gradients: tuple[Array, Array]
) -> tuple[Array, Array, Array, None]:
    query, keys, values, segments, mixed, total = saved
    d_mixed, d_total = gradients
    # The gradient of softmax is weights * (d_weights - their weighted mean); the log-sum-exp adds
    # weights * d_total.
    offset = jnp.sum(d_mixed * mixed, axis=-1) - d_total

    def part(
        keys: Array,
        values: Array,
        segments: Array,
        sums: tuple[Array, Array],
        inputs: tuple[Array, ...],
    ) -> tuple[Any, Array]:
        query, total, d_mixed, offset, own, index = inputs
        d_mixed = d_mixed.astype(values.dtype)
        scores = _scores(query, keys, _visible(own, segments, index))
        weights = jnp.exp(scores - total[..., None])
        d_weights = _product("bkgte,bkse->bkgts", d_mixed, values)
        d_scores = (weights * (d_weights - offset[..., None])).astype(keys.dtype)
        weights = weights.astype(values.dtype)
        sums = (
            sums[0] + _product("bkgts,bkgte->bkse", d_scores, query),
            sums[1] + _product("bkgts,bkgte->bkse", weights, d_mixed),
        )
        return sums, _product("bkgts,bkse->bkgte", d_scores, keys).astype(query.dtype)

    # Groups run from last to first, so that the gradients of keys after a group's end are complete.
    t = query.shape[3]
    sums = jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32)
    d_query, d_keys, d_values = [], [], []
    for first, end in reversed(_groups(t, chunk)):
        seen = keys[:, :, :end], values[:, :, :end], segments[:, :end]
        # The padding of the last chunk repeats the last row, with a gradient of zero.
        repeated = (_cut(x[:, :, :, first:end], 3, chunk) for x in (query, total))
        zeroed = (_cut(x[:, :, :, first:end], 3, chunk, "constant") for x in (d_mixed, offset))
        rows = _rows(segments, first, end, chunk)
        sums, found = jax.lax.scan(
            functools.partial(part, *seen), sums, (*repeated, *zeroed, *rows)
        )
        d_query.append(_join(found, 3, end - first))
        d_keys.append(sums[0][:, :, first:].astype(keys.dtype))
        d_values.append(sums[1][:, :, first:].astype(values.dtype))
        sums = sums[0][:, :, :first], sums[1][:, :, :first]
    whole = [
        jnp.concatenate(parts[::-1], axis=axis)
        for parts, axis in ((d_query, 3), (d_keys, 2), (d_values, 2))
    ]
    return whole[0], whole[1], whole[2], None


causal.defvjp(_causal_forward, _causal_backward)


def _product(letters: str, left: Array, right: Array) -> Array:
    return jnp.einsum(letters, left, right, preferred_element_type=jnp.float32)


def _scores(query: Array, keys: Array, visible: Bool[Array, "b c t"]) -> Float[Array, "b k g c t"]:
    scores = _product("bkgte,bkse->bkgts", query, keys)
    return jnp.where(visible[:, None, None], scores, -jnp.inf)


def _visible(
    own: Int[Array, "b c"], segments: Int[Array, "b t"], index: Int[Array, " c"]
) -> Bool[Array, "b c t"]:
    earlier = index[:, None] >= jnp.arange(segments.shape[1])[None]
    return (own[:, :, None] == segments[:, None, :]) & earlier[None]


def _groups(length: int, chunk: int) -> list[tuple[int, int]]:
    """Returns first query and end of each group of chunks; the last group may be shorter."""
    size = -(-length // (chunk * _GROUPS)) * chunk
    return [(first, min(first + size, length)) for first in range(0, length, size)]


def _rows(
    segments: Int[Array, "b t"], first: int, end: int, chunk: int
) -> tuple[Int[Array, "n b c"], Int[Array, "n c"]]:
    """Returns the segments and the positions of the queries of each chunk."""
    own = _cut(segments[:, first:end], 1, chunk)
    count, _, size = own.shape
    return own, first + jnp.arange(count * size).reshape(count, size)


def _cut(x: Array, axis: int, chunk: int, mode: str = "edge") -> Array:
    """Splits `axis` into padded chunks along a new first axis: [chunks, ..., chunk, ...]."""
    length = x.shape[axis]
    chunk = min(chunk, length)
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -length % chunk)
    x = jnp.pad(x, widths, mode=mode)
    shape = (*x.shape[:axis], -1, chunk, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis, 0)


def _join(x: Array, axis: int, length: int) -> Array:
    """Undoes `_cut`."""
    x = jnp.moveaxis(x, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, length, axis=axis)
