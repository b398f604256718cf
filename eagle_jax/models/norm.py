"""RMSNorm and addition to the residual stream, fused by our kernel on GPUs, else by XLA."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from eagle_jax.models import kernels
from eagle_jax.models.matmul import PartialSums, Product, as_array
from eagle_jax.types import Hidden


class RMSNorm(nnx.Module):
    """Root-mean-square norm, computed in float32 for any dtype of the input.

    With `unit_offset` (Gemma) it multiplies by 1 + scale, also in float32, and then rounds.
    """

    def __init__(
        self, width: int, eps: float, *, unit_offset: bool = False, rngs: nnx.Rngs
    ) -> None:
        del rngs
        self.scale = nnx.Param(jnp.zeros(width) if unit_offset else jnp.ones(width))
        self.eps = eps
        self.unit_offset = unit_offset

    def __call__(self, x: Float[Array, "*lead d"]) -> Float[Array, "*lead d"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + jnp.float32(self.eps))
        if self.unit_offset:
            scale = jnp.float32(1) + self.scale[...].astype(jnp.float32)
            return (y * jnp.broadcast_to(scale, x.shape)).astype(x.dtype)
        scale = jnp.broadcast_to(self.scale[...], x.shape)
        return y.astype(x.dtype) * scale


def add_norm(x: Hidden, update: Product, norm: RMSNorm) -> tuple[Hidden, Hidden]:
    """Returns the residual stream `x + update`, and its norm."""
    if isinstance(update, PartialSums) and kernels.norm.fits(x):
        flat, scale = x.reshape(-1, x.shape[-1]), norm.scale[...]
        both = kernels.norm.add(flat, update.parts, scale, norm.eps, norm.unit_offset)
        x, normed = (y.reshape(x.shape) for y in both)
        return x, normed
    x = x + as_array(update)
    return x, norm(x)
