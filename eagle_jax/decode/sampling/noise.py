"""Noise keyed by seed and absolute position, so that every method draws the same text.

Noise of position t is `g_t = gumbel(fold_in(key, t))`, one vector over the vocabulary, and the
target's token at t is `argmax(process(logits) + g_t)`: an exact draw from the processed
distribution (the Gumbel-max trick) that depends on the prefix, the key and the position alone,
not on how many tokens were verified together.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32


def position_noise(
    seeds: UInt32[Array, " b"], first: Int[Array, " b"], count: int, vocab: int
) -> Float[Array, "b n v"]:
    """Gumbel noise of positions `first .. first + count - 1` of each row."""
    return _by_position(seeds, first, count, lambda key: jax.random.gumbel(key, (vocab,)))


def draft_noise(
    seeds: UInt32[Array, " b"], first: Int[Array, " b"], count: int, vocab: int
) -> Float[Array, "b n v"]:
    """Gumbel noise independent of `position_noise`, for drafts that must not know the target's."""

    def draw(key: jax.Array) -> jax.Array:
        return jax.random.gumbel(jax.random.fold_in(key, 1), (vocab,))

    return _by_position(seeds, first, count, draw)


def position_uniform(
    seeds: UInt32[Array, " b"], first: Int[Array, " b"], count: int
) -> Float[Array, "b n"]:
    """Uniform numbers of positions, independent of both noises above."""
    return _by_position(
        seeds, first, count, lambda key: jax.random.uniform(jax.random.fold_in(key, 2))
    )


def _by_position(
    seeds: UInt32[Array, " b"],
    first: Int[Array, " b"],
    count: int,
    draw: Callable[[jax.Array], jax.Array],
) -> Array:
    def one(seed: jax.Array, position: jax.Array) -> jax.Array:
        return draw(jax.random.fold_in(jax.random.key(seed), position))

    positions = first[:, None] + jnp.arange(count, dtype=jnp.int32)[None]
    return jax.vmap(jax.vmap(one, in_axes=(None, 0)))(seeds, positions)
