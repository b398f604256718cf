"""Linear, embedding and norm, and how products reach the residual stream.

Matrices are stored [in, out] (Flax's `kernel`): on CPUs XLA multiplies a few rows by such a matrix
at nearly the cost of one row, by its transpose at twice that.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

from eagle_jax.models import kernels, quantize
from eagle_jax.models.quantize import Quantization
from eagle_jax.sharding import summed, ways_of
from eagle_jax.types import Hidden

# A kernel and, if it is int8, the scales of its outputs.
Weight = tuple[jax.Array, jax.Array | None]

_EMBEDDING_STD = 0.02


def matmul(
    x: Float[Array, "*lead i"],
    kernel: Num[Array, "..."],
    dtype: DTypeLike | None = None,
    scale: Float[Array, "..."] | None = None,
    turned: bool = False,
) -> Float[Array, "..."]:
    """`x @ kernel` over the last axis; `dtype` is the result's, by default that of the operands.

    A kernel may have several axes of outputs; an int8 kernel comes with its `scale` and has them
    before its inputs (`quantize`), as any other has that is `turned`.
    """
    if (parts := _parts(x, kernel, scale, turned)) is not None:
        return parts.total(dtype)
    if scale is not None:
        return quantize.product(x, kernel, scale, dtype)
    if x.size == x.shape[-1] and kernels.on_gpu():
        # XLA makes a reduction of its own of one row by a matrix, which reads weights more slowly
        # than a product of two rows.
        row = x.reshape(1, -1)
        pair = jnp.concatenate([row, jnp.zeros_like(row)])
        y = _xla(pair, kernel, dtype, turned)[:1]
        return y.reshape(*x.shape[:-1], *y.shape[1:])
    return _xla(x, kernel, dtype, turned)


def _xla(x: jax.Array, kernel: jax.Array, dtype: DTypeLike | None, turned: bool) -> jax.Array:
    axes = (-1, -1 if turned else 0)
    return jnp.tensordot(x, kernel, axes, preferred_element_type=dtype)


@dataclasses.dataclass(frozen=True)
class Parts:
    """A product [*shape] of `kernels.skinny_matmul` whose parts are still to be added up.

    Whoever reads it next does that in passing.
    """

    array: Float[Array, "p n o"]  # float32, but for the sum of what devices have, which is rounded
    shape: tuple[int, ...]
    dtype: DTypeLike

    def total(self, dtype: DTypeLike | None = None) -> Float[Array, "..."]:
        """The product, in `dtype` or that of its operand."""
        added = self.array[0] if len(self.array) == 1 else jnp.sum(self.array, axis=0)
        return added.astype(self.dtype if dtype is None else dtype).reshape(self.shape)


def _parts(
    x: jax.Array, kernel: jax.Array, scale: jax.Array | None, turned: bool = False
) -> Parts | None:
    """The product by a kernel of our own, where it fits."""
    rows, width = x.reshape(-1, x.shape[-1]), x.shape[-1]
    turned = turned or scale is not None
    flat = kernel.reshape(-1, width) if turned else kernel.reshape(width, -1)
    outputs = kernel.shape[:-1] if turned else kernel.shape[1:]
    if not kernels.skinny_matmul.fits(rows, flat):
        return None
    flat_scale = None if scale is None else scale.reshape(-1)
    array = kernels.skinny_matmul.product(rows, flat, flat_scale, turned=turned)
    return Parts(array, (*x.shape[:-1], *outputs), x.dtype)


def whole(added: Hidden | Parts) -> Hidden:
    """A result that may still be in parts."""
    return added.total() if isinstance(added, Parts) else added


def total(x: Hidden, added: Hidden | Parts) -> Hidden:
    """The residual stream and what is added to it."""
    return x + whole(added)


def over_group(added: Hidden | Parts, here: int, all_of: int, logical: str) -> Hidden | Parts:
    """A product with the sum over an axis of which `here` of `all_of` are on this device."""
    if here == all_of:
        return added
    if isinstance(added, Parts):  # still parts, for the kernels that read them
        own = jnp.sum(added.array, axis=0, keepdims=True).astype(added.dtype)
        return dataclasses.replace(added, array=summed(own, logical))
    return summed(added, logical)


def join(x: Hidden, added: Hidden | Parts, norm: RMSNorm) -> tuple[Hidden, Hidden]:
    """The residual stream with what is added to it, and its norm."""
    if isinstance(added, Parts) and kernels.norm.fits(x):
        flat, scale = x.reshape(-1, x.shape[-1]), norm.scale[...]
        both = kernels.norm.add(flat, added.array, scale, norm.eps, norm.unit_offset)
        joined, normed = (y.reshape(x.shape) for y in both)
        return joined, normed
    x = total(x, added)
    return x, norm(x)


def matrix(
    shape: tuple[int, ...],
    std: float,
    quantization: Quantization | None,
    rngs: nnx.Rngs,
    axis: int = 0,
) -> tuple[nnx.Param[Any], nnx.Param[Any] | None]:
    """A random kernel, and its scales if it is quantised; `axis` is the input's."""
    kernel = std * jax.random.normal(rngs.params(), shape)
    if quantization is None:
        return nnx.Param(kernel), None
    kernel, scale = quantize.quantize(kernel, axis)
    return nnx.Param(kernel), nnx.Param(scale)


def weight_of(module: Any) -> Weight:
    """The kernel and the scales of a module that `matrix` made."""
    scale = module.kernel_scale
    return module.kernel[...], None if scale is None else scale[...]


class Linear(nnx.Module):
    """`x @ kernel (+ bias)`; the last axis of any array.

    Starts with unit gain, or, where it feeds the residual stream (`zero`), at zero: every layer is
    the identity at first, and depth does not slow the start of training down.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        bias: bool = False,
        zero: bool = False,
        quantization: Quantization | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        std = 0.0 if zero else d_in**-0.5
        self.kernel, self.kernel_scale = matrix((d_in, d_out), std, quantization, rngs)
        self.bias = nnx.Param(jnp.zeros(d_out)) if bias else None

    def __call__(self, x: Float[Array, "*lead i"]) -> Float[Array, "*lead o"]:
        y = self.product(x)
        if self.bias is None:
            return y
        return y + jnp.broadcast_to(self.bias[...], y.shape)

    def product(
        self, x: Float[Array, "*lead i"], dtype: DTypeLike | None = None
    ) -> Float[Array, "*lead o"]:
        """Without the bias, in the result dtype `dtype`."""
        kernel, scale = weight_of(self)
        return matmul(x, kernel, dtype, scale)

    def lazily(self, x: Float[Array, "*lead i"]) -> Float[Array, "*lead o"] | Parts:
        """The result, or its parts, for `join` and `total`."""
        kernel, scale = weight_of(self)
        parts = None if self.bias is not None else _parts(x, kernel, scale)
        return self(x) if parts is None else parts


class Embedding(nnx.Module):
    """Token embedding, [v, d]; `scale` multiplies what is looked up, not the matrix."""

    def __init__(
        self, vocab: int, width: int, *, scale: float | None = None, rngs: nnx.Rngs
    ) -> None:
        self.embedding = nnx.Param(
            _EMBEDDING_STD * jax.random.normal(rngs.params(), (vocab, width))
        )
        self.scale = scale

    def __call__(self, tokens: Int[Array, "b t"]) -> Hidden:
        table = self.embedding[...]
        if tokens.size == 1 and ways_of("vocab", table.shape[0]) > 1:
            # Of one token XLA makes a slice, for which GPUs gather the whole table.
            x = table.at[jnp.concatenate([tokens, tokens], axis=1)].get(mode="clip")[:, :1]
        else:
            x = table.at[tokens].get(mode="clip")
        # In the weights' dtype: Gemma was trained with a scale rounded to bfloat16.
        return x if self.scale is None else x * jnp.asarray(self.scale, x.dtype)

    def product(
        self, x: Float[Array, "*lead d"], dtype: DTypeLike | None = None
    ) -> Float[Array, "*lead v"]:
        """As a head, whose columns are the embeddings, in the result dtype `dtype`."""
        return matmul(x, self.embedding[...], dtype, turned=True)


class RMSNorm(nnx.Module):
    """Root-mean-square norm, computed in float32 whatever the dtype of the input.

    With `unit_offset` it multiplies with 1 + scale, also in float32, and rounds after that.
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
