"""A product of few rows by an int8 matrix for GPUs, in Pallas (Triton).

Not measured and not in use: `quantize.KERNEL` says which kernel multiplies. A program owns some
columns of the result and walks down the matrix; int8 becomes the activations' dtype in registers,
so that memory is read at a byte a weight.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int8

# Of the result that a program owns, and of the matrix's rows that it takes at a time.
COLUMNS, STEP = 32, 128
_ROWS = (16, 32, 64)  # a tensor core multiplies at least 16 rows
_WARPS, _STAGES = 4, 4


def fits(x: jax.Array, kernel: jax.Array) -> bool:
    """Whether `product` can do it: few rows, whole blocks, and no float32, whose bits it loses."""
    width, columns = kernel.shape
    blocks = width % STEP == 0 and columns % COLUMNS == 0
    return blocks and x.shape[0] <= _ROWS[-1] and x.dtype.itemsize == 2


def product(
    x: Float[Array, "n i"],
    kernel: Int8[Array, "i o"],
    scale: Float32[Array, " o"],
    dtype: DTypeLike,
    *,
    interpret: bool = False,
) -> Float[Array, "n o"]:
    """`x @ kernel * scale`, summed and scaled in float32."""
    (few, width), columns = x.shape, kernel.shape[1]
    rows = next(size for size in _ROWS if size >= few)
    run = pl.pallas_call(
        _program,
        grid=(columns // COLUMNS,),
        in_specs=[
            pl.BlockSpec((rows, width), lambda i: (0, 0)),
            pl.BlockSpec((width, COLUMNS), lambda i: (0, i)),
            pl.BlockSpec((COLUMNS,), lambda i: (i,)),
        ],
        out_specs=pl.BlockSpec((rows, COLUMNS), lambda i: (0, i)),
        out_shape=jax.ShapeDtypeStruct((rows, columns), dtype),
        compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
        interpret=interpret,
        name="int8_product",
    )
    return run(jnp.pad(x, ((0, rows - few), (0, 0))), kernel, scale)[:few]


def _program(x_ref, kernel_ref, scale_ref, out_ref) -> None:
    """One program; the references are to memory, what is indexed is read."""

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        down = pl.ds(i * STEP, STEP)
        x, kernel = x_ref[:, down], kernel_ref[down, :]
        return total + jnp.dot(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)

    total = jnp.zeros(out_ref.shape, jnp.float32)
    total = jax.lax.fori_loop(0, x_ref.shape[1] // STEP, add, total)
    scale = jnp.broadcast_to(scale_ref[...][None], total.shape)
    out_ref[...] = (total * scale).astype(out_ref.dtype)
