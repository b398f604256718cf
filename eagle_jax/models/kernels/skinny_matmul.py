"""Multiplies few rows by a matrix as fast as the matrix can be read.

A program handles some columns of the result and a part of the sum, and walks down the matrix. With
few columns, splitting the sum into parts gives enough programs for the device; the reader of the
result adds the parts up. An int8 matrix [o, i] is cast to the activations' dtype in registers, so
that memory is read at one byte per weight. An embedding used as a head has the same layout [o, i].
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Float32, Num

from eagle_jax.models.kernels import device

_ROWS = (16, 32, 64)  # a tensor core multiplies at least 16
_TENSOR_CORE_COLUMNS = 16  # a tensor core multiplies at least 16 columns
_SATURATING_PROGRAMS = 80  # programs that saturate the memory of 132 multiprocessors
_WIDE_TILE_PROGRAMS = 120  # programs from which wide tiles are kept
_LINE_COLUMNS = 64  # columns of two bytes that fill one line of memory


@dataclasses.dataclass(frozen=True)
class Tile:
    """The tiling: columns per program, rows of the matrix per step, parts of the sum."""

    columns: int
    step: int
    parts: int
    warps: int = 4
    stages: int = 4


def tile(rows: int, width: int, columns: int, itemsize: int) -> Tile | None:
    """Returns the tile for `rows` rows and a matrix [width, columns], or None if no tile fits.

    The numbers are the fastest of a sweep over the matrices of a 7B model on an H100;
    `benchmarks/tile_sweep.py` runs the sweep.
    """
    wide, step, stages = 128, 64, 4
    programs = 256 if itemsize == 1 else _WIDE_TILE_PROGRAMS
    if rows > _ROWS[0]:
        stages = 3
        if itemsize == 2 and columns // wide < programs:
            wide, programs, stages = 64, 190, 4
    elif itemsize == 1:
        wide, step = 64 if columns // 64 >= 128 else 32, 128
    while wide > 16 and columns % wide:
        wide //= 2
    while step > 16 and width % step:
        step //= 2
    if rows > _ROWS[-1] or columns % wide or width % step:
        return None
    parts = 1
    while columns // wide * parts < programs and parts < 8 and width // step % (2 * parts) == 0:
        parts *= 2
    return Tile(wide, step, parts, stages=stages)


def fits(x: jax.Array, kernel: jax.Array) -> bool:
    """Returns whether `product` can multiply x [n, i] by kernel [i, o], or by int8 [o, i]."""
    small = kernel.dtype == jnp.int8 or kernel.dtype == x.dtype
    return small and device.usable(x) and _tile(x, kernel) is not None


def _tile(x: jax.Array, kernel: jax.Array) -> Tile | None:
    rows, width = x.shape
    return tile(rows, width, kernel.size // width, kernel.dtype.itemsize)


@functools.partial(jax.jit, static_argnames=("cut", "transposed"))
def product(
    x: Float[Array, "n i"],
    kernel: Num[Array, "a b"],
    scale: Float32[Array, " o"] | None = None,
    cut: Tile | None = None,
    transposed: bool = False,
) -> Float32[Array, "p n o"]:
    """Returns `x @ kernel (* scale)` as p partial sums in float32.

    Args:
        x: activations of few rows; `fits` must accept them.
        kernel: [i, o] in the dtype of `x`; [o, i] if it is `transposed` or int8.
        scale: scales of an int8 kernel's outputs.
        cut: the tile; by default that of `tile`.
        transposed: whether the kernel's last axis is the input axis.
    """
    n, width = x.shape
    columns, transposed = kernel.size // width, transposed or scale is not None
    cut = cut or _tile(x, kernel)
    assert cut is not None
    rows, steps = _rows(n), width // cut.step // cut.parts

    def program(x_ref, *rest) -> None:  # the arguments are references to memory
        *matrix, out_ref = rest
        first = pl.program_id(1) * steps
        (total,) = _walk(x_ref, matrix[:1], matrix[1:], n, rows, cut, first, steps, transposed)
        _put(out_ref, total, n)

    scales = [] if scale is None else [(scale, pl.BlockSpec((cut.columns,), lambda i, _: (i,)))]
    tall = pl.BlockSpec((width, cut.columns), lambda i, _: (0, i))
    flat = pl.BlockSpec((cut.columns, width), lambda i, _: (i, 0))
    return pl.pallas_call(
        program,
        grid=(columns // cut.columns, cut.parts),
        in_specs=[
            pl.BlockSpec((n, width), lambda *_: (0, 0)),
            flat if transposed else tall,
            *(spec for _, spec in scales),
        ],
        out_specs=pl.BlockSpec((None, n, cut.columns), lambda i, part: (part, 0, i)),
        out_shape=jax.ShapeDtypeStruct((cut.parts, n, columns), jnp.float32),
        compiler_params=triton.CompilerParams(num_warps=cut.warps, num_stages=cut.stages),
        interpret=device.INTERPRET,
        name="product",
    )(x, kernel, *(array for array, _ in scales))


def gates(x: jax.Array, kernel: jax.Array) -> bool:
    """Returns whether `gated` can multiply x [n, i] by kernel [i, 2, f], or by int8 [2, f, i]."""
    return fits(x, kernel) and _of_gates(x, kernel) is not None


def gated_tile(rows: int, width: int, columns: int, itemsize: int) -> Tile | None:
    """Returns the tile of gate and up, each [width, columns], for `rows` rows, or None.

    It has one part, because the gate needs whole sums. None means that no tile fits.
    """
    cut = tile(rows, width, 2 * columns, itemsize)
    if cut is None:
        return None
    few = itemsize == 2 and _SATURATING_PROGRAMS <= columns // _LINE_COLUMNS < _WIDE_TILE_PROGRAMS
    if few and rows <= _ROWS[1] and columns % _LINE_COLUMNS == 0 and width % 128 == 0:
        # This tile was the fastest of a sweep at 2048 x 5632; it is not narrowed for more programs.
        return Tile(_LINE_COLUMNS, 128, 1, stages=4 if rows <= _ROWS[0] else 3)
    wide = cut.columns
    while wide > 64 and 2 * columns // wide < _SATURATING_PROGRAMS:
        wide //= 2
    half = wide // 2
    if half < _TENSOR_CORE_COLUMNS or columns % half:
        return None
    return dataclasses.replace(cut, columns=half, parts=1)


def _of_gates(x: jax.Array, kernel: jax.Array) -> Tile | None:
    rows, width = x.shape
    return gated_tile(rows, width, kernel.size // width // 2, kernel.dtype.itemsize)


@functools.partial(jax.jit, static_argnames="cut")
def gated(
    x: Float[Array, "n i"],
    kernel: Num[Array, "a b c"],
    scale: Float32[Array, "2 f"] | None = None,
    cut: Tile | None = None,
) -> Float[Array, "n f"]:
    """Returns `silu(x @ gate) * (x @ up)`; `kernel` [i, 2, f], or int8 [2, f, i], holds both.

    `cut` is the tile of each of the two and has one part; by default that of `gated_tile`.
    """
    (n, width), transposed = x.shape, scale is not None
    columns = kernel.size // width // 2
    cut = cut or _of_gates(x, kernel)
    assert cut is not None
    rows, steps, blocks = _rows(n), width // cut.step, columns // cut.columns

    def program(x_ref, *rest) -> None:
        *matrices, out_ref = rest
        both = _walk(x_ref, matrices[:2], matrices[2:], n, rows, cut, 0, steps, transposed)
        # Rounds as a product that is written to memory does.
        gate, up = (total.astype(x.dtype).astype(jnp.float32) for total in both)
        _put(out_ref, gate / (1 + jnp.exp(-gate)) * up, n)

    kernel = kernel.reshape((2 * columns, width) if transposed else (width, 2 * columns))
    halves = [lambda i: i, lambda i: blocks + i]
    if transposed:
        specs = [pl.BlockSpec((cut.columns, width), lambda i, at=at: (at(i), 0)) for at in halves]
    else:
        specs = [pl.BlockSpec((width, cut.columns), lambda i, at=at: (0, at(i))) for at in halves]
    scales = [] if scale is None else [scale.reshape(-1)] * 2
    of_scales = [pl.BlockSpec((cut.columns,), lambda i, at=at: (at(i),)) for at in halves]
    return pl.pallas_call(
        program,
        grid=(blocks,),
        in_specs=[
            pl.BlockSpec((n, width), lambda _: (0, 0)),
            *specs,
            *of_scales[: len(scales)],
        ],
        out_specs=pl.BlockSpec((n, cut.columns), lambda i: (0, i)),
        out_shape=jax.ShapeDtypeStruct((n, columns), x.dtype),
        compiler_params=triton.CompilerParams(num_warps=cut.warps, num_stages=cut.stages),
        interpret=device.INTERPRET,
        name="gated",
    )(x, kernel, kernel, *scales)


def _rows(n: int) -> int:
    return next(size for size in _ROWS if size >= n)


def _walk(
    x_ref,
    kernel_refs,
    scale_refs,
    n: int,
    rows: int,
    cut: Tile,
    first,
    steps: int,
    transposed: bool,
) -> tuple[jax.Array, ...]:
    """Returns the products of all rows with a program's columns of some matrices.

    The sum covers `steps` steps down the matrices, from step `first` on.
    """
    seen = jax.lax.broadcasted_iota(jnp.int32, (rows, cut.step), 0) < n

    def add(i: jax.Array, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        at = pl.ds((first + i) * cut.step, cut.step)
        some = triton.load(x_ref.at[pl.ds(0, rows), at], mask=seen, other=0)
        matrices = [
            ref[:, at].astype(some.dtype).T if transposed else ref[at, :] for ref in kernel_refs
        ]
        return tuple(
            total + jnp.dot(some, matrix, preferred_element_type=jnp.float32)
            for total, matrix in zip(totals, matrices, strict=True)
        )

    zeros = (jnp.zeros((rows, cut.columns), jnp.float32),) * len(kernel_refs)
    totals = jax.lax.fori_loop(jnp.int32(0), jnp.int32(steps), add, zeros)
    if not scale_refs:
        return totals
    return tuple(
        total * jnp.broadcast_to(ref[...][None], total.shape)
        for total, ref in zip(totals, scale_refs, strict=True)
    )


def _put(out_ref, total: jax.Array, n: int) -> None:
    here = jax.lax.broadcasted_iota(jnp.int32, total.shape, 0) < n
    triton.store(out_ref.at[pl.ds(0, len(total)), :], total.astype(out_ref.dtype), mask=here)
