"""A pass over whole prompts, in chunks: memory grows with the prompt, not with its square."""

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

# Tokens of a chunk: enough that arithmetic, not the reading of weights, takes the time.
CHUNK = 512

# (inputs, positions, mask, cache, lengths) of a chunk -> anything [b, t, ...], keys and values.
Pass = Callable[
    [Any, Int[Array, "b t"], Bool[Array, "b t t"], Cache | None, Int[Array, " b"] | None],
    tuple[Any, Cache],
]


def fill(run: Pass, inputs: Any, slots: int, chunk: int = CHUNK) -> tuple[Any, Cache]:
    """Feed right-padded prompts to a causal model.

    Padding comes last, so nobody sees it; its keys and values are overwritten before they are read.

    Args:
        run: one pass; the cache holds what came before the chunk.
        inputs: arrays [b, t, ...].
        slots: of the cache, at least t.
        chunk: longest chunk; of prompts beyond it, the largest that divides both.

    Returns:
        What `run` returned first, for all t tokens, and the cache [b, k, slots, e] per array.
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
        # No longer than the prompt: every chunk reads all slots.
        starts = jnp.arange(0, t, width, dtype=jnp.int32)
        block, output = jax.lax.scan(piece, empty(block, t), starts)
        output = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(b, t, *x.shape[3:]), output)
    return output, caches.write(empty(block, slots), block, jnp.zeros(b, jnp.int32))
