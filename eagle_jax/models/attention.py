"""Attention over a cache and a fresh block; this module selects the implementation.

`two_segment_attention` is the default and runs by our kernel or by XLA. `aligned_attention` rounds
equally whichever tokens are verified together. cuDNN's attention serves training.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from eagle_jax.models import kernels
from eagle_jax.models.heads import Heads, UnsplitHeads, split
from eagle_jax.types import KeyValue

AttentionKernel = Literal["xla", "cudnn", "aligned"]

# Positions in a span of `aligned_attention`, the limit on the depth of its trees.
SPAN = 32


def attention(
    heads: Heads | UnsplitHeads,
    mask: Bool[Array, "b t u"],
    positions: Int[Array, "b t"],
    *,
    prefix: KeyValue | None = None,
    lengths: Int[Array, " b"] | None = None,
    before: KeyValue | None = None,
    kernel: AttentionKernel = "xla",
    oldest: Int[Array, "b t"] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Float[Array, "b t h e"], KeyValue]:
    """Returns the attended values, and the block's keys and values [b, k, t, e].

    Args:
        heads: rotated queries and keys, and values, of the block.
        mask: which fresh tokens each token sees: those of `before`, then the block's own.
        positions: positions of the block's tokens.
        prefix, lengths: the cache and its number of used slots, or None.
        before: keys and values of earlier blocks of the same round.
        kernel: "xla" uses our kernel where it fits; "cudnn" is for training, without a cache;
            "aligned" is `aligned_attention` and needs a cache.
        oldest, scale, softcap: as in `two_segment_attention`.

    Raises:
        ValueError: `kernel` is "cudnn", which has no soft cap, and `softcap` is given.
    """
    bounds = {"oldest": oldest, "scale": scale, "softcap": softcap}
    if isinstance(heads, UnsplitHeads):
        if (
            kernel == "xla"
            and before is None
            and prefix is not None
            and lengths is not None
            and kernels.attention.splits(heads, prefix)
        ):
            return kernel_attention(heads, None, mask, prefix, lengths, **bounds)
        heads = split(heads)
    query, keys, values = heads
    if kernel == "cudnn":
        if softcap is not None:
            raise ValueError(
                f"attention='cudnn': attn_logit_softcapping={softcap} is beyond this kernel; use "
                "attention='xla'"
            )
        mixed = jax.nn.dot_product_attention(
            query, keys, values, mask=mask[:, None], scale=scale, implementation="cudnn"
        )
    block = (keys.transpose(0, 2, 1, 3), values.transpose(0, 2, 1, 3))
    if kernel == "aligned":
        assert before is None and prefix is not None and lengths is not None
        mixed = aligned_attention(query, block, mask, positions, prefix, lengths, **bounds)
    if kernel == "xla":
        seen = block
        if before is not None:
            seen = jax.tree.map(lambda a, c: jnp.concatenate([a, c], axis=2), before, block)
        mixed = two_segment_attention(query, seen, mask, prefix, lengths, **bounds)
    return mixed, block


def two_segment_attention(
    query: Float[Array, "b t h e"],
    block: KeyValue,
    mask: Bool[Array, "b t u"],
    prefix: KeyValue | None,
    lengths: Int[Array, " b"] | None,
    *,
    oldest: Int[Array, "b t"] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "b t h e"]:
    """Returns attention over a read-only prefix cache and a fresh block in one softmax.

    Every query sees prefix slots `0 .. lengths - 1` of its row and the block entries that `mask`
    allows. For a tree of 4 nodes (1 and 2 children of 0, 3 a child of 1) after a prefix of 3:

        slots    0 1 2 . .   block 0 1 2 3
        node 0   x x x             x
        node 1   x x x             x x
        node 2   x x x             x   x
        node 3   x x x             x x   x

    Args:
        query: queries of the block's t tokens.
        block: keys and values [b, k, u, e] of the fresh tokens (u > t if they include earlier
            blocks of the same round).
        mask: which fresh tokens each query sees.
        prefix: keys and values [b, k, s, e], or None.
        lengths: number of used prefix slots, per row.
        oldest: the first prefix slot that each query sees; by default slot 0. A slot's number is
            its token's position; siblings in a tree share a position.
        scale: factor of the scores; by default 1 / sqrt(e).
        softcap: c of the soft cap, which turns scores x into c tanh(x / c).

    Returns:
        [b, t, h, e] in the query's dtype; scores and softmax are float32.
    """
    b, t, h, e = query.shape
    k = block[0].shape[1]
    # [b, k, t*g, e]: one matrix product serves the g query heads of a key head.
    grouped = query.reshape(b, t, k, h // k, e).transpose(0, 2, 1, 3, 4).reshape(b, k, -1, e)
    if prefix is not None and lengths is not None and kernels.attention.fits(query, prefix):
        bounds = {"oldest": oldest, "scale": scale, "softcap": softcap}
        return kernel_attention(grouped, block, mask, prefix, lengths, **bounds)[0]
    factor = e**-0.5 if scale is None else scale
    grouped = grouped * jnp.asarray(factor, query.dtype)

    def score(keys: jax.Array, visible: jax.Array) -> jax.Array:
        scores = jnp.einsum("bkqe,bkse->bkqs", grouped, keys, preferred_element_type=jnp.float32)
        if softcap is not None:
            scores = soft_cap(scores, softcap)
        return jnp.where(visible, scores, -jnp.inf)

    visible = jnp.repeat(mask, h // k, axis=1)[:, None]
    if prefix is None or lengths is None:
        weights = jax.nn.softmax(score(block[0], visible), axis=-1).astype(query.dtype)
        mixed = jnp.einsum("bkqs,bkse->bkqe", weights, block[1])
    else:
        slots = prefix[0].shape[2]
        used = (jnp.arange(slots)[None, :] < lengths[:, None])[:, None, None, :]
        if oldest is not None:
            recent = jnp.arange(slots)[None, None, :] >= oldest[:, :, None]
            used = used & jnp.repeat(recent, h // k, axis=1)[:, None]
        scores = jnp.concatenate([score(prefix[0], used), score(block[0], visible)], axis=-1)
        weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
        mixed = jnp.einsum("bkqs,bkse->bkqe", weights[..., :slots], prefix[1])
        mixed = mixed + jnp.einsum("bkqs,bkse->bkqe", weights[..., slots:], block[1])
    return mixed.reshape(b, k, t, h // k, e).transpose(0, 2, 1, 3, 4).reshape(b, t, h, e)


def kernel_attention(
    query: Float[Array, "b k q e"] | UnsplitHeads,
    block: KeyValue | None,
    mask: Bool[Array, "b t u"],
    prefix: KeyValue,
    lengths: Int[Array, " b"],
    *,
    oldest: Int[Array, "b t"] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Float[Array, "b t h e"], KeyValue]:
    """Runs `two_segment_attention` by our kernel; also returns the block's keys and values.

    Args:
        query: t g rows for each key head; or the fused projection of queries, keys and values.
        block: as in `two_segment_attention`; None if `query` is the fused projection.
        mask, prefix, lengths, oldest, scale, softcap: as in `two_segment_attention`.
    """
    (_, _, q, e), t = query.shape, mask.shape[1]
    of_rows = jnp.repeat(mask, q // t, axis=1)
    edges = None if oldest is None else jnp.repeat(oldest, q // t, axis=1)
    factor = e**-0.5 if scale is None else scale
    return kernels.attention.attend(
        query, block, of_rows, prefix, lengths, edges, t, factor, softcap
    )


def aligned_attention(
    query: Float[Array, "b t h e"],
    block: KeyValue,
    mask: Bool[Array, "b t t"],
    positions: Int[Array, "b t"],
    prefix: KeyValue,
    lengths: Int[Array, " b"],
    *,
    oldest: Int[Array, "b t"] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "b t h e"]:
    """Returns `two_segment_attention` with results that do not depend on the tree, bit for bit.

    Which tokens are verified together decides whether a key comes from the cache or from the block,
    and the place where a sum is split affects its rounding. Here a query's own position decides the
    split: the last 32 to 64 positions form a window, collected from cache and block, and all
    earlier positions are in the cache. So a text has one order of summation for given shapes. The
    cost for a tree is t copies of the window.

    Args:
        query, block, mask, prefix, lengths, oldest, scale, softcap: as in `two_segment_attention`.
        positions: positions of the block's tokens; the first follows the cache, each depth adds
            one, and the deepest is less than `SPAN` beyond the cache.

    Returns:
        [b, t, h, e] in the query's dtype; scores and softmax are float32.
    """
    b, t, h, e = query.shape
    k, slots = block[0].shape[1], prefix[0].shape[2]
    query = query * jnp.asarray(e**-0.5 if scale is None else scale, query.dtype)
    grouped = query.reshape(b, t, k, h // k, e).transpose(0, 2, 1, 3, 4)  # [b, k, t, g, e]
    start = jnp.maximum(positions // SPAN - 1, 0) * SPAN  # start of each query's window
    window = start[:, :, None] + jnp.arange(2 * SPAN)[None, None, :]  # [b, t, w] positions
    far = jnp.arange(slots)[None, None, :]
    seen_far = far < start[:, :, None]
    at = mask[:, :, None, :] & (positions[:, None, None, :] == window[..., None])  # [b, t, w, t]
    fresh = jnp.any(at, axis=-1)
    seen_near = fresh | (window < lengths[:, None, None])
    if oldest is not None:
        seen_far = seen_far & (far >= oldest[:, :, None])
        seen_near = seen_near & (window >= oldest[:, :, None])

    def near(old: jax.Array, new: jax.Array) -> Float[Array, "b k t w e"]:
        def pick(x: jax.Array, index: jax.Array) -> jax.Array:
            flat = index.reshape(b, 1, -1, 1)
            return jnp.take_along_axis(x, flat, axis=2, mode="clip").reshape(b, k, t, -1, e)

        fresh_ones = pick(new, jnp.argmax(at, axis=-1))
        return jnp.where(fresh[:, None, :, :, None], fresh_ones, pick(old, window))

    def score(spelled: str, keys: jax.Array, visible: Bool[Array, "b t s"]) -> jax.Array:
        scores = jnp.einsum(spelled, grouped, keys, preferred_element_type=jnp.float32)
        if softcap is not None:
            scores = soft_cap(scores, softcap)
        return jnp.where(visible[:, None, :, None, :], scores, -jnp.inf)

    keys, values = (near(old, new) for old, new in zip(prefix, block, strict=True))
    parts = [
        score("bktge,bkse->bktgs", prefix[0], seen_far),
        score("bktge,bktwe->bktgw", keys, seen_near),
    ]
    weights = jax.nn.softmax(jnp.concatenate(parts, axis=-1), axis=-1).astype(query.dtype)
    mixed = jnp.einsum("bktgs,bkse->bktge", weights[..., :slots], prefix[1])
    mixed = mixed + jnp.einsum("bktgw,bktwe->bktge", weights[..., slots:], values)
    return mixed.transpose(0, 2, 1, 3, 4).reshape(b, t, h, e)


def soft_cap(x: Float[Array, "*lead o"], cap: float) -> Float[Array, "*lead o"]:
    """Returns cap tanh(x / cap), which is close to x for small x and never exceeds ± cap."""
    return jnp.tanh(x / jnp.asarray(cap, x.dtype)) * jnp.asarray(cap, x.dtype)
