"""Tensors that lie in files and are read when they are asked for.

A checkpoint is described, checked and converted without being in memory; whoever needs numbers
takes them tensor by tensor.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

_BLOCK = 1024  # rows that are read at a time where some are chosen


@dataclasses.dataclass(frozen=True, eq=False)
class LazyTensor:
    """A tensor in a file; `np.asarray(stored)` reads it, anew each time.

    Attributes:
        shape: of the array that reading gives.
        dtype: of that array.
        load: reads it.
        part: reads rows from the first of two numbers up to the second, where that is cheaper.
        base: what this is the transpose of, if it is one.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray]
    part: Callable[[int, int], np.ndarray] | None = None
    base: LazyTensor | None = None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy  # what is read is always new
        array = self.load()
        return array if dtype is None else array.astype(dtype, copy=False)

    def __len__(self) -> int:
        return self.shape[0]

    def blocks(self, starts: Iterable[int], rows: int) -> Iterator[np.ndarray]:
        """So many rows from each start, or those that there are."""
        part = self.part
        if part is None:
            whole = np.asarray(self)
            yield from (whole[start : start + rows] for start in starts)
        else:
            yield from (part(start, min(start + rows, len(self))) for start in starts)

    def rows(self, chosen: np.ndarray) -> LazyTensor:
        """These rows, in this order; of the others a block at a time is in memory."""

        def load() -> np.ndarray:
            result = np.empty((len(chosen), *self.shape[1:]), self.dtype)
            starts = chosen // _BLOCK * _BLOCK
            needed = np.unique(starts).tolist()
            for start, block in zip(needed, self.blocks(needed, _BLOCK), strict=True):
                inside = starts == start
                result[inside] = block[chosen[inside] - start]
            return result

        return LazyTensor((len(chosen), *self.shape[1:]), self.dtype, load)

    @property
    def nbytes(self) -> int:
        """Bytes in memory, once read."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def T(self) -> LazyTensor:
        """Transposed."""
        if self.base is not None:
            return self.base
        return LazyTensor(self.shape[::-1], self.dtype, lambda: self.load().T, base=self)

    def astype(self, dtype: Any) -> LazyTensor:
        """In another dtype, cast when it is read."""
        dtype = np.dtype(dtype)
        if dtype == self.dtype:
            return self
        return LazyTensor(self.shape, dtype, lambda: self.load().astype(dtype))


def cast(name: str, tensor: LazyTensor, dtype: Any) -> LazyTensor:
    """A weight in another dtype, cast when it is read.

    Raises:
        ValueError: when it is read, if numbers become infinite.
    """
    dtype = np.dtype(dtype)
    if dtype == tensor.dtype:
        return tensor

    def load() -> np.ndarray:
        array = tensor.load()
        with np.errstate(over="ignore"):
            result = array.astype(dtype)
        infinite = np.isinf(result)
        if np.any(infinite) and np.any(np.isfinite(array[infinite])):
            raise ValueError(
                f"{name}: has numbers that are too large for {dtype.name}; take bfloat16 or float32"
            )
        return result

    return LazyTensor(tensor.shape, dtype, load)


def equal(one: LazyTensor, two: LazyTensor) -> bool:
    """Whether two tensors are the same, block by block."""
    if (one.shape, one.dtype) != (two.shape, two.dtype):
        return False
    if getattr(one.load, "args", ()) == getattr(two.load, "args", None):
        return True  # the same bytes of the same file
    starts = range(0, len(one), 4096)
    pairs = zip(one.blocks(starts, 4096), two.blocks(starts, 4096), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def lazily(array: Any) -> LazyTensor:
    """Any array, numpy's or JAX's, as a `Stored`; one that is a `Stored` stays as it is."""
    if isinstance(array, LazyTensor):
        return array
    return LazyTensor(tuple(array.shape), np.dtype(array.dtype), lambda: np.asarray(array))
