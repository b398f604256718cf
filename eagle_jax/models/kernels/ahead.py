"""Reading ahead: memory is idle while small kernels run, and the next matrix is known.

A kernel that leaves most of the device alone gets programs beside its own, which read the rows of
the next matrix that its product begins with. They stay in the device's cache until it comes.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Num

from eagle_jax.models.kernels.product import tile

# What a kernel reads ahead, at most; 0 is nothing.
BYTES = 2**23

_COLUMNS = 256  # of a block
_BLOCK = 2**15  # its bytes


@dataclasses.dataclass(frozen=True)
class Ahead:
    """Blocks at the beginning of every part of a product by `matrix` [i, o]."""

    matrix: Num[Array, "i o"]
    rows: int
    parts: int
    stride: int
    programs: int

    @property
    def spec(self) -> pl.BlockSpec:
        return pl.BlockSpec(self.matrix.shape, lambda *_: (0, 0))

    @property
    def checks(self) -> jax.ShapeDtypeStruct:
        """What the programs write: a number each."""
        return jax.ShapeDtypeStruct((self.programs,), jnp.float32)

    def read(self, matrix_ref, check_ref, program: jax.Array) -> None:
        """Reads the block of a program; its sum keeps the compiler from leaving that out."""
        across = self.matrix.shape[1] // _COLUMNS
        group = program // across
        first = group % self.parts * self.stride + group // self.parts * self.rows
        rows = pl.ds(first, self.rows)
        block = matrix_ref[rows, pl.ds(program % across * _COLUMNS, _COLUMNS)]
        check_ref[program] = jnp.sum(block.astype(jnp.float32))


def plan(matrix: jax.Array | None, rows: int) -> Ahead | None:
    """What to read ahead of a product of so many rows by `matrix`, if anything."""
    if matrix is None:
        return None
    flat = matrix.reshape(len(matrix), -1)
    width, columns = flat.shape
    size = flat.dtype.itemsize
    cut = tile(rows, width, columns, size)
    if cut is None or columns % _COLUMNS or size > 2:
        return None
    deep = _BLOCK // _COLUMNS // size
    group = columns // _COLUMNS * cut.parts  # programs that read a block at every part's beginning
    stride = -(-(width // cut.step) // cut.parts) * cut.step  # rows of a part
    groups = min(BYTES // (group * _BLOCK), (width - (cut.parts - 1) * stride) // deep)
    if groups == 0:
        return None
    return Ahead(flat, deep, cut.parts, stride, groups * group)
