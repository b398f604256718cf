"""The prefill in chunks, whose memory grows linearly with the prompt instead of quadratically."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from eagle_jax.models import Cache
from eagle_jax.models import cache as caches
from eagle_jax.models.transformer import packed_mask

# Tokens per chunk: enough for a pass to be bound by arithmetic, not by reading the weights.
CHUNK = 512

# (inputs, positions, mask, cache, lengths) of a chunk -> any arrays [b, t, ...], keys and values.
Pass = Callable[
    [Any, Int[Array, "b t"], Bool[Array, "b t t"], Cache | None, Int[Array, " b"] | None],
    tuple[Any, Cache],
]


def fill(run: Pass, inputs: Any, slots: int, chunk: int = CHUNK) -> tuple[Any, Cache]:
    """Runs a causal model over right-padded prompts and returns its output and KV cache.

    Padding comes last, so no prompt token attends to it, and its keys and values are overwritten
    before they are read.

    Args:
        run: runs one pass over a chunk, given a cache of the tokens before it.
        inputs: arrays [b, t, ...].
        slots: capacity of the cache, at least t.
        chunk: longest chunk. Longer prompts use chunks of gcd(t, chunk) tokens.

    Returns:
        The first result of `run` for all t tokens, and the KV cache, [b, k, slots, e] per array.
    """
    b, t = jax.tree.leaves(inputs)[0].shape[:2]
    width = t if t <= chunk else math.gcd(t, chunk)
    mask = packed_mask(jnp.zeros((b, width), jnp.int32))
    steps = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None], (b, width))

    def empty(block: Any, slots: int) -> Cache:
        keys = block[0][0]
        return caches.empty(len(block), b, keys.shape[1], slots, keys.shape[3], keys.dtype)

    def piece(cache: Cache, start: jax.Array) -> tuple[Cache, Any]:
        own = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, width, axis=1), inputs)
        lengths = jnp.broadcast_to(start, (b,))
        output, block = run(own, start + steps, mask, cache, lengths)
        return caches.write(cache, block, lengths), output

    if t == width:
        output, block = run(inputs, steps, mask, None, None)
    else:
        first = jax.tree.map(lambda x: x[:, :width], inputs)
        block = jax.eval_shape(lambda: run(first, steps, mask, None, None)[1])
        # Every chunk reads all slots, so the cache is only as long as the prompt here.
        starts = jnp.arange(0, t, width, dtype=jnp.int32)
        block, output = jax.lax.scan(piece, empty(block, t), starts)
        output = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(b, t, *x.shape[3:]), output)
    return output, caches.write(empty(block, slots), block, jnp.zeros(b, jnp.int32))
