"""Stores weights in eight bits, so that every pass reads half the bytes of bfloat16.

Each output of a matrix [in, out] has its own scale: its largest magnitude divided by 127. The
parameters are `X.kernel`, int8 [out, in], and `X.kernel_scale`, float32 [out]; the weight is their
product. The input axis is last because tensor cores need it contiguous: their operand loads
can transpose pairs of bytes, but not single bytes. Activations are not quantised. GPU and TPU
compilers cast the weights inside the kernel that multiplies, so memory is read as int8. On CPUs the
cast makes temporary matrices and nothing is gained.
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
"""Suffix that turns the name of a matrix into the name of its scales."""

# On GPUs XLA's products with a set of 7B matrices take 2.16 ms for one row, 1.55 ms for eight.
LEAST_ROWS = 8

_LARGEST = 127  # the int8 range used is symmetric: -127 to 127

# The matrices that are quantised. Routers are not: they are small, and their errors are costly.
_MATRIX = re.compile(
    r"(.*\.([qkvo]|qkv|gate|up|gate_up|down)_proj|(.*\.)?lm_head|fc"
    r"|heads\..*\.(linear|lm_proj))\.kernel"  # Medusa's heads
)
_STACKED = re.compile(r".*\.experts\.[a-z].*")


def checked(name: str, method: Any) -> Quantization | None:
    """Returns the quantization that a user gave as argument `name`, or None.

    Raises:
        ValueError: the quantization is unknown; the message lists the valid ones.
    """
    if method is not None and (not isinstance(method, str) or method not in QUANTIZATIONS):
        raise ValueError(
            f"{name}={method!r}: unknown; use {', '.join(map(repr, QUANTIZATIONS))}, or None for "
            "weights as they are"
        )
    return cast("Quantization | None", method)


def quantised(name: str) -> bool:
    """Returns whether quantisation makes a parameter of a target or a draft int8."""
    return _MATRIX.fullmatch(name) is not None


def input_axis(name: str) -> int:
    """Returns the input axis of a kernel: the first, or the second for stacked experts."""
    return 1 if _STACKED.fullmatch(name) else 0


def quantize(
    kernel: Float[Array, "*shape"], axis: int = 0
) -> tuple[Int8[Array, "*outputs i"], Float32[Array, "*outputs"]]:
    """Returns `kernel` as symmetric int8, rounded to nearest, and a scale for every output.

    `axis` is the input axis of `kernel`; in the result it is the last.
    """
    largest = jnp.max(jnp.abs(kernel), axis=axis, keepdims=True).astype(jnp.float32)
    # The lower bound avoids division by zero for outputs whose weights are all zero.
    scale = jnp.maximum(largest / _LARGEST, jnp.finfo(jnp.float32).tiny)
    steps = jnp.round(kernel.astype(jnp.float32) / jnp.broadcast_to(scale, kernel.shape))
    return jnp.moveaxis(steps.astype(jnp.int8), axis, -1), jnp.squeeze(scale, axis)


def dequantize(
    kernel: Int8[Array, "*outputs i"], scale: Float32[Array, "*outputs"], axis: int = 0
) -> Float32[Array, "*shape"]:
    """Returns the float32 weights of an int8 kernel, with the input axis moved back to `axis`."""
    return jnp.moveaxis(kernel.astype(jnp.float32) * scale[..., None], -1, axis)


def quantize_params(params: ParamDict) -> dict[str, jax.Array]:
    """Returns parameters with int8 matrices; the configuration must have `quantize="int8"` then.

    Raises:
        ValueError: the parameters are already quantised.
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
    """Returns `x` times the int8 weight, summed and scaled in float32, by XLA."""
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
    """Multiplies by several matrices at once.

    `equation` is the einsum for a float kernel; the last axis of `x` is the input axis. `scale`
    broadcasts to the result of an int8 kernel, and is None for a float kernel.
    """
    if scale is None:
        return jnp.einsum(equation, x, kernel)
    left, axes, result = re.split(",|->", equation)
    equation = f"{left},{axes.replace(left[-1], '')}{left[-1]}->{result}"
    y = jnp.einsum(equation, x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
    return (y * jnp.broadcast_to(scale, y.shape)).astype(x.dtype)
