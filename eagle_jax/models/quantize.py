"""Weights in eight bits: half of bfloat16's bytes to read in every pass.

Of a matrix [in, out] every output has a scale of its own: its largest magnitude over 127. Stored
are `X.kernel`, int8 [out, in], and `X.kernel_scale`, float32 [out], so that the weight is their
product. The inputs of an output lie side by side because tensor cores take them so, and what loads
their operands turns pairs of bytes, not bytes. Activations stay as they are. What a compiled loop
reads of a matrix is its bytes: GPU and TPU compilers cast in the kernel that multiplies (on CPUs
the cast matrices are temporaries of the call, and nothing is gained).
"""

from __future__ import annotations

import re
from typing import Any, Literal, cast, get_args

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int8

from eagle_jax.models.kernels import device
from eagle_jax.types import ParamDict

Quantization = Literal["int8"]
QUANTIZATIONS: tuple[str, ...] = get_args(Quantization)

SCALE = "_scale"
"""What the name of a matrix's scales ends in, after the name of the matrix."""

# On GPUs XLA's product of one row takes 2.16 ms over a set of 7B matrices, of eight rows 1.55.
LEAST_ROWS = 8

_LARGEST = 127  # of int8, both ways

# The matrices of models that are quantised. A router is small, and wrong choices are dear.
_MATRIX = re.compile(
    r"(.*\.([qkvo]|qkv|gate|up|gate_up|down)_proj|(.*\.)?lm_head|fc"
    r"|heads\..*\.(linear|lm_proj))\.kernel"  # of Medusa
)
_STACKED = re.compile(r".*\.experts\.[a-z].*")


def checked(name: str, method: Any) -> Quantization | None:
    """A user's argument `name`, or nothing where it is None.

    Raises:
        ValueError: it is unknown; lists those that there are.
    """
    if method is not None and (not isinstance(method, str) or method not in QUANTIZATIONS):
        raise ValueError(
            f"{name}={method!r}: unknown; use {', '.join(map(repr, QUANTIZATIONS))}, or None for "
            "weights as they are"
        )
    return cast("Quantization | None", method)


def quantised(name: str) -> bool:
    """Whether a parameter, of a target or a draft, becomes int8."""
    return _MATRIX.fullmatch(name) is not None


def input_axis(name: str) -> int:
    """The axis of a kernel that a product sums over: the first; stacked experts come before it."""
    return 1 if _STACKED.fullmatch(name) else 0


def quantize(
    kernel: Float[Array, "*shape"], axis: int = 0
) -> tuple[Int8[Array, "*outputs i"], Float32[Array, "*outputs"]]:
    """Symmetric int8, rounded to nearest, with a scale for every output.

    `axis` is the input's: the last of the result.
    """
    largest = jnp.max(jnp.abs(kernel), axis=axis, keepdims=True).astype(jnp.float32)
    # At least this, for outputs that are always zero.
    scale = jnp.maximum(largest / _LARGEST, jnp.finfo(jnp.float32).tiny)
    steps = jnp.round(kernel.astype(jnp.float32) / jnp.broadcast_to(scale, kernel.shape))
    return jnp.moveaxis(steps.astype(jnp.int8), axis, -1), jnp.squeeze(scale, axis)


def dequantize(
    kernel: Int8[Array, "*outputs i"], scale: Float32[Array, "*outputs"], axis: int = 0
) -> Float32[Array, "*shape"]:
    """The weight that a product sees, its inputs at `axis` again."""
    return jnp.moveaxis(kernel.astype(jnp.float32) * scale[..., None], -1, axis)


def quantize_params(params: ParamDict) -> dict[str, jax.Array]:
    """A model's parameters with int8 matrices; its configuration then has `quantize="int8"`.

    Raises:
        ValueError: they are quantised already.
    """
    result: dict[str, jax.Array] = {}
    for name, array in params.items():
        if not quantised(name):
            result[name] = array
            continue
        if jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(
                f"{name}: is {array.dtype}, quantised already; give the model as it was before"
            )
        result[name], result[name + SCALE] = quantize(array, input_axis(name))
    return result


def product(
    x: Float[Array, "*lead i"],
    kernel: Int8[Array, "... i"],
    scale: Float32[Array, "..."],
    dtype: DTypeLike | None = None,
) -> Float[Array, "..."]:
    """`x` times the weight, summed and scaled in float32, by XLA."""
    dtype = x.dtype if dtype is None else dtype
    width, shape = x.shape[-1], (*x.shape[:-1], *scale.shape)
    few = x.size // width
    if few < LEAST_ROWS and device.on_gpu():
        rows = jnp.pad(x.reshape(few, width), ((0, LEAST_ROWS - few), (0, 0)))
        return _xla(rows, kernel, scale, dtype)[:few].reshape(shape)
    return _xla(x, kernel, scale, dtype)


def _xla(x: jax.Array, kernel: jax.Array, scale: jax.Array, dtype: DTypeLike) -> jax.Array:
    y = jnp.tensordot(x, kernel.astype(x.dtype), (-1, -1), preferred_element_type=jnp.float32)
    return (y * jnp.broadcast_to(scale, y.shape)).astype(dtype)


def einsum(
    equation: str, x: Float[Array, "..."], kernel: jax.Array, scale: jax.Array | None
) -> Float[Array, "..."]:
    """Products by several matrices at once; `scale` fits the result, None is of a float kernel.

    `equation` is that of a float kernel, whose inputs are the last axis of `x`.
    """
    if scale is None:
        return jnp.einsum(equation, x, kernel)
    left, axes, result = re.split(",|->", equation)
    equation = f"{left},{axes.replace(left[-1], '')}{left[-1]}->{result}"
    y = jnp.einsum(equation, x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
    return (y * jnp.broadcast_to(scale, y.shape)).astype(x.dtype)
