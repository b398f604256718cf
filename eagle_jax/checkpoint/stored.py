"""Tensors that lie in files and are read when they are asked for.

A checkpoint is described, checked and converted without being in memory; whoever needs numbers
takes them tensor by tensor.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """A tensor in a file; `np.asarray(stored)` reads it, anew each time.

    Attributes:
        shape: of the array that reading gives.
        dtype: of that array.
        load: reads it.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy  # what is read is always new
        array = self.load()
        return array if dtype is None else array.astype(dtype, copy=False)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes in memory, once read."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def T(self) -> Stored:
        """Transposed."""
        return Stored(self.shape[::-1], self.dtype, lambda: self.load().T)

    def astype(self, dtype: Any) -> Stored:
        """In another dtype, cast when it is read."""
        dtype = np.dtype(dtype)
        if dtype == self.dtype:
            return self
        return Stored(self.shape, dtype, lambda: self.load().astype(dtype))


def lazily(array: Any) -> Stored:
    """Any array, numpy's or JAX's, as a `Stored`; one that is a `Stored` stays as it is."""
    if isinstance(array, Stored):
        return array
    return Stored(tuple(array.shape), np.dtype(array.dtype), lambda: np.asarray(array))
