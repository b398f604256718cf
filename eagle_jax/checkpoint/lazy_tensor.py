"""Lazy tensors: they stay in their files until their numbers are needed.

A checkpoint can be described, checked and converted with only one tensor at a time in memory.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

_BLOCK = 1024  # rows that `rows` reads at a time


@dataclasses.dataclass(frozen=True, eq=False)
class LazyTensor:
    """A tensor in a file; every `np.asarray(tensor)` reads the file again.

    Attributes:
        shape: shape of the array that is read.
        dtype: dtype of that array.
        load: reads the array.
        part: `part(start, stop)` reads these rows only, or None if that is not cheaper.
        base: the tensor that this one is the transpose of, or None.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray]
    part: Callable[[int, int], np.ndarray] | None = None
    base: LazyTensor | None = None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy  # reading always makes a new array
        array = self.load()
        return array if dtype is None else array.astype(dtype, copy=False)

    def __len__(self) -> int:
        return self.shape[0]

    def blocks(self, starts: Iterable[int], rows: int) -> Iterator[np.ndarray]:
        """Yields `rows` rows from each start, or fewer at the end of the tensor."""
        part = self.part
        if part is None:
            whole = np.asarray(self)
            yield from (whole[start : start + rows] for start in starts)
        else:
            yield from (part(start, min(start + rows, len(self))) for start in starts)

    def rows(self, chosen: np.ndarray) -> LazyTensor:
        """Returns a tensor of these rows in this order; reading it takes one block at a time."""

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
        """The number of bytes of the array that is read."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def T(self) -> LazyTensor:
        """The transposed tensor."""
        if self.base is not None:
            return self.base
        return LazyTensor(self.shape[::-1], self.dtype, lambda: self.load().T, base=self)

    def astype(self, dtype: Any) -> LazyTensor:
        """Returns the tensor in another dtype; it is cast when it is read."""
        dtype = np.dtype(dtype)
        if dtype == self.dtype:
            return self
        return LazyTensor(self.shape, dtype, lambda: self.load().astype(dtype))


def cast(name: str, tensor: LazyTensor, dtype: Any) -> LazyTensor:
    """Returns a weight in another dtype; it is cast when it is read.

    Raises:
        ValueError: reading it makes a finite number infinite.
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
    """Returns whether two tensors are equal; compares block by block."""
    if (one.shape, one.dtype) != (two.shape, two.dtype):
        return False
    if getattr(one.load, "args", ()) == getattr(two.load, "args", None):
        return True  # the same bytes of the same file
    starts = range(0, len(one), 4096)
    pairs = zip(one.blocks(starts, 4096), two.blocks(starts, 4096), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def lazily(array: Any) -> LazyTensor:
    """Returns an array of numpy or JAX as a `LazyTensor`; a `LazyTensor` is returned as it is."""
    if isinstance(array, LazyTensor):
        return array
    return LazyTensor(tuple(array.shape), np.dtype(array.dtype), lambda: np.asarray(array))
