"""Linear layers and the token embedding: the modules that hold matrices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from eagle_jax.models import quantize
from eagle_jax.models.matmul import Product, Weight, matmul, partial_sums
from eagle_jax.models.quantize import Quantization
from eagle_jax.sharding import parts_of
from eagle_jax.types import Hidden

_EMBEDDING_STD = 0.02


def random_matrix(
    shape: tuple[int, ...],
    std: float,
    quantization: Quantization | None,
    rngs: nnx.Rngs,
    axis: int = 0,
) -> tuple[nnx.Param[Any], nnx.Param[Any] | None]:
    """Returns a normally distributed kernel and, if it is quantised, its scales.

    `axis` is the kernel's input axis.
    """
    kernel = std * jax.random.normal(rngs.params(), shape)
    if quantization is None:
        return nnx.Param(kernel), None
    kernel, scale = quantize.quantize(kernel, axis)
    return nnx.Param(kernel), nnx.Param(scale)


def weight_of(module: Any) -> Weight:
    """Returns the kernel of a module, and its scales if it is int8."""
    scale = module.kernel_scale
    return module.kernel[...], None if scale is None else scale[...]


class Linear(nnx.Module):
    """A linear layer over the last axis of any array: `x @ kernel (+ bias)`.

    The initial kernel has unit gain. If the result is added to the residual stream (`zero`), the
    kernel starts at zero: every layer is the identity at first, so depth does not slow down the
    start of training.
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
        self.kernel, self.kernel_scale = random_matrix((d_in, d_out), std, quantization, rngs)
        self.bias = nnx.Param(jnp.zeros(d_out)) if bias else None

    def __call__(self, x: Float[Array, "*lead i"]) -> Float[Array, "*lead o"]:
        y = self.product(x)
        if self.bias is None:
            return y
        return y + jnp.broadcast_to(self.bias[...], y.shape)

    def product(
        self, x: Float[Array, "*lead i"], dtype: DTypeLike | None = None
    ) -> Float[Array, "*lead o"]:
        """Returns `x @ kernel`, without the bias, in `dtype`."""
        kernel, scale = weight_of(self)
        return matmul(x, kernel, dtype, scale)

    def partial(self, x: Float[Array, "*lead i"]) -> Product:
        """Returns the result, possibly as partial sums that the next kernel adds up."""
        kernel, scale = weight_of(self)
        product = None if self.bias is not None else partial_sums(x, kernel, scale)
        return self(x) if product is None else product


class Stack(nnx.Module):
    """Several matrices of one shape in one array; `axis` is their input axis."""

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        axis: int = 0,
        zero: bool = False,
        quantization: Quantization | None,
        rngs: nnx.Rngs,
    ) -> None:
        std = 0.0 if zero else shape[axis] ** -0.5
        self.kernel, self.kernel_scale = random_matrix(shape, std, quantization, rngs, axis)


class Embedding(nnx.Module):
    """Token embedding [v, d]; `scale` multiplies the vectors that are looked up, not the matrix."""

    def __init__(
        self, vocab: int, width: int, *, scale: float | None = None, rngs: nnx.Rngs
    ) -> None:
        self.embedding = nnx.Param(
            _EMBEDDING_STD * jax.random.normal(rngs.params(), (vocab, width))
        )
        self.scale = scale

    def __call__(self, tokens: Int[Array, "b t"]) -> Hidden:
        table = self.embedding[...]
        if tokens.size == 1 and parts_of("vocab", table.shape[0]) > 1:
            # XLA turns the lookup of one token into a slice, which gathers the whole table on GPUs.
            x = table.at[jnp.concatenate([tokens, tokens], axis=1)].get(mode="clip")[:, :1]
        else:
            x = table.at[tokens].get(mode="clip")
        # The scale has the weights' dtype: Gemma was trained with one rounded to bfloat16.
        return x if self.scale is None else x * jnp.asarray(self.scale, x.dtype)

    def product(
        self, x: Float[Array, "*lead d"], dtype: DTypeLike | None = None
    ) -> Float[Array, "*lead v"]:
        """Returns scores of all tokens in `dtype`, with the embedding as vocabulary head."""
        return matmul(x, self.embedding[...], dtype, transposed=True)
