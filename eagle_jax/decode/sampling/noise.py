"""Noise keyed by seed and absolute position, so that every method draws the same text.

The noise of position t is `g_t = gumbel(fold_in(key, t))`, one vector over the vocabulary. The
target's token at t is `argmax(process(logits) + g_t)`, an exact draw from the processed
distribution (the Gumbel-max trick). It depends only on the prefix, the key and the position, not
on how many tokens were verified together.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32


def position_noise(
    seeds: UInt32[Array, " b"], first: Int[Array, " b"], count: int, vocab: int
) -> Float[Array, "b n v"]:
    """Returns the Gumbel noise of positions `first .. first + count - 1` of each row."""
    return _by_position(seeds, first, count, lambda key: jax.random.gumbel(key, (vocab,)))


def draft_noise(
    seeds: UInt32[Array, " b"], first: Int[Array, " b"], count: int, vocab: int
) -> Float[Array, "b n v"]:
    """Returns Gumbel noise that is independent of `position_noise`.

    Drafts use it where the acceptance rule needs their draws to be independent of the target's.
    """

    def draw(key: jax.Array) -> jax.Array:
        return jax.random.gumbel(jax.random.fold_in(key, 1), (vocab,))

    return _by_position(seeds, first, count, draw)


def position_uniform(
    seeds: UInt32[Array, " b"], first: Int[Array, " b"], count: int
) -> Float[Array, "b n"]:
    """Returns one uniform number per position, independent of both noises above."""
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
