"""Rotary position embedding, and its scaling for long contexts."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from eagle_jax.config import RopeScaling


def scaled_frequencies(theta: float, half: int, scaling: RopeScaling) -> tuple[np.ndarray, float]:
    """Returns scaled rotary frequencies [half], and the factor of queries and keys."""
    frequency = theta ** (-np.arange(half) / half)
    slowed, context = frequency / scaling.factor, scaling.original_max_position_embeddings
    if scaling.rope_type == "linear" or context is None:
        return slowed, 1.0
    if scaling.rope_type == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        turns = context * frequency / (2 * math.pi)  # full turns within the original context
        kept = np.clip((turns - low) / (high - low), 0, 1)
        return kept * frequency + (1 - kept) * slowed, 1.0

    def dimension(turns: float) -> float:
        return half * math.log(context / (turns * 2 * math.pi)) / math.log(theta)

    first, last = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * half - 1)
    # The published code avoids division by zero in the same way.
    ramp = np.clip((np.arange(half) - first) / (last - first or 0.001), 0, 1)
    return ramp * slowed + (1 - ramp) * frequency, _yarn_attention(scaling)


def _yarn_attention(scaling: RopeScaling) -> float:
    def term(weight: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * weight * math.log(scaling.factor) + 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return term(scaling.mscale) / term(scaling.mscale_all_dim)
    return term(1.0)


def angles(
    positions: Int[Array, "b t"], half: int, theta: float, scaling: RopeScaling | None
) -> tuple[Float32[Array, "b t f"], Float32[Array, "b t f"]]:
    """Returns the cosines and sines for the `half` pairs of a head."""
    if scaling is None:
        frequency, factor = theta ** (-jnp.arange(half, dtype=jnp.float32) / half), 1.0
    else:
        table, factor = scaled_frequencies(theta, half, scaling)
        frequency = jnp.asarray(table, jnp.float32)
    angle = positions.astype(jnp.float32)[:, :, None] * frequency[None, None, :]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    if factor != 1.0:
        sin, cos = sin * jnp.float32(factor), cos * jnp.float32(factor)
    return cos, sin


def rotary(
    x: Float[Array, "b t h e"],
    positions: Int[Array, "b t"],
    theta: float,
    scaling: RopeScaling | None = None,
) -> Float[Array, "b t h e"]:
    """Returns `x` rotated to `positions`, in Hugging Face's layout (halves, not pairs)."""
    both = angles(positions, x.shape[-1] // 2, theta, scaling)
    cos, sin = (turn[:, :, None] for turn in both)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
