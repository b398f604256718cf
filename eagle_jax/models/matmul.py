"""Matrix products; this module selects XLA's, or our kernel for few rows on GPUs.

Matrices are stored [in, out] (Flax's `kernel`): on CPUs XLA multiplies a few rows by such a matrix
at nearly the cost of one row, but by a transposed matrix at twice that cost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

from eagle_jax.models import kernels, quantize
from eagle_jax.sharding import all_reduce

# A kernel and, if it is int8, the scales of its outputs.
Weight = tuple[jax.Array, jax.Array | None]


@dataclasses.dataclass(frozen=True)
class PartialSums:
    """A product [*shape] that our kernel left as p partial sums; its reader adds them up.

    Attributes:
        parts: the partial sums in float32, or one rounded sum after `all_reduced`.
        shape: shape of the product.
        dtype: dtype of the product.
    """

    parts: Float[Array, "p n o"]
    shape: tuple[int, ...]
    dtype: DTypeLike

    def sum(self, dtype: DTypeLike | None = None) -> Float[Array, "..."]:
        """Returns the product, in `dtype` or in its own."""
        added = self.parts[0] if len(self.parts) == 1 else jnp.sum(self.parts, axis=0)
        return added.astype(self.dtype if dtype is None else dtype).reshape(self.shape)


# A product that will be added to the residual stream or split into heads.
Product = Float[Array, "..."] | PartialSums


def matmul(
    x: Float[Array, "*lead i"],
    kernel: Num[Array, "..."],
    dtype: DTypeLike | None = None,
    scale: Float[Array, "..."] | None = None,
    transposed: bool = False,
) -> Float[Array, "..."]:
    """Returns `x @ kernel` over the last axis of `x`.

    Args:
        x: activations.
        kernel: [i, *outputs]; [*outputs, i] if it is `transposed` or int8.
        dtype: dtype of the result; by default that of `x`.
        scale: scales [*outputs] of an int8 kernel.
        transposed: whether the kernel's last axis is the input axis.
    """
    if (product := partial_sums(x, kernel, scale, transposed)) is not None:
        return product.sum(dtype)
    if scale is not None:
        return quantize.product(x, kernel, scale, dtype)
    if x.size == x.shape[-1] and kernels.on_gpu():
        # XLA turns one row by a matrix into a reduction, which reads weights more slowly than a
        # product with two rows.
        row = x.reshape(1, -1)
        pair = jnp.concatenate([row, jnp.zeros_like(row)])
        y = _by_xla(pair, kernel, dtype, transposed)[:1]
        return y.reshape(*x.shape[:-1], *y.shape[1:])
    return _by_xla(x, kernel, dtype, transposed)


def _by_xla(
    x: jax.Array, kernel: jax.Array, dtype: DTypeLike | None, transposed: bool
) -> jax.Array:
    axes = (-1, -1 if transposed else 0)
    return jnp.tensordot(x, kernel, axes, preferred_element_type=dtype)


def partial_sums(
    x: Float[Array, "*lead i"],
    kernel: Num[Array, "..."],
    scale: Float[Array, "..."] | None = None,
    transposed: bool = False,
) -> PartialSums | None:
    """Returns the product by our kernel, or None where the kernel does not fit."""
    rows, width = x.reshape(-1, x.shape[-1]), x.shape[-1]
    transposed = transposed or scale is not None
    flat = kernel.reshape(-1, width) if transposed else kernel.reshape(width, -1)
    outputs = kernel.shape[:-1] if transposed else kernel.shape[1:]
    if not kernels.skinny_matmul.fits(rows, flat):
        return None
    flat_scale = None if scale is None else scale.reshape(-1)
    parts = kernels.skinny_matmul.product(rows, flat, flat_scale, transposed=transposed)
    return PartialSums(parts, (*x.shape[:-1], *outputs), x.dtype)


def gated_matmul(
    x: Float[Array, "*lead d"],
    weight: Weight,
    activation: Callable[[jax.Array], jax.Array],
) -> Float[Array, "*lead f"]:
    """Returns `activation(x @ gate) * (x @ up)` of a fused kernel [d, 2, f] (int8: [2, f, d]).

    Our kernel does it in one launch where the activation is SiLU.
    """
    kernel, scale = weight
    rows = x.reshape(-1, x.shape[-1])
    if activation is jax.nn.silu and kernels.skinny_matmul.gates(rows, kernel):
        return kernels.skinny_matmul.gated(rows, kernel, scale).reshape(*x.shape[:-1], -1)
    both = matmul(x, kernel, scale=scale)
    return activation(both[..., 0, :]) * both[..., 1, :]


def as_array(product: Product) -> Float[Array, "..."]:
    """Returns a product with its parts added up."""
    return product.sum() if isinstance(product, PartialSums) else product


def all_reduced(product: Product, local: int, size: int, axis: str) -> Product:
    """All-reduces a product when this device holds only part of the contracted axis.

    Args:
        product: product over this device's part of the axis.
        local: length of this device's part of the contracted axis.
        size: length of the whole axis; equal to `local` if the axis is not split.
        axis: name of the logical axis that is split ("heads", "mlp").
    """
    if local == size:
        return product
    if isinstance(product, PartialSums):  # keep the type for the kernels that read it
        own = jnp.sum(product.parts, axis=0, keepdims=True).astype(product.dtype)
        return dataclasses.replace(product, parts=all_reduce(own, axis))
    return all_reduce(product, axis)
