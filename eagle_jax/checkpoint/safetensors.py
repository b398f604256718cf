"""Reads and writes safetensors files, as numpy arrays or as lazy tensors.

The safetensors package writes the memory of a non-contiguous array in the wrong order, and
truncates the old file before it writes the new one; `write` does neither. Reading uses the package,
which validates the header.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes  # registers bfloat16 with numpy
import numpy as np
from safetensors import SafetensorError, safe_open

from eagle_jax.checkpoint.lazy_tensor import LazyTensor

DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "int32": "I32",
    "int64": "I64",
    "float16": "F16",
    ml_dtypes.bfloat16.__name__: "BF16",
    "float32": "F32",
    "float64": "F64",
}


_BY_CODE = {code: np.dtype(name) for name, code in DTYPES.items()}


def read(path: str | Path) -> dict[str, np.ndarray]:
    """Reads all tensors of a safetensors file and returns them in their dtypes on disk.

    Raises:
        ValueError: the file is missing, truncated or corrupt.
    """
    return {name: np.asarray(tensor) for name, tensor in stored(path).items()}


def stored(path: str | Path) -> dict[str, LazyTensor]:
    """Returns the tensors of a safetensors file as lazy tensors; reads only the header.

    Raises:
        ValueError: the file is missing, truncated or corrupt, or has a dtype outside `DTYPES`.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the path of a .safetensors file")
    tensors = {}
    with _opened(path) as file:
        for name in file.keys():
            entry = file.get_slice(name)
            code = entry.get_dtype()
            if code not in _BY_CODE:
                known = ", ".join(_BY_CODE)
                raise ValueError(
                    f"{path}: {name} has dtype {code}, as quantised weights have; known: {known}; "
                    "give the model as it was before it was quantised"
                )
            load = functools.partial(_load, path, name)
            part = functools.partial(_part, path, name)
            tensors[name] = LazyTensor(tuple(entry.get_shape()), _BY_CODE[code], load, part)
    return tensors


def _load(path: Path, name: str) -> np.ndarray:
    # Opened for every tensor, because the pages of an open memory map would stay in memory.
    with _opened(path) as file:
        return file.get_tensor(name)


def _part(path: Path, name: str, start: int, stop: int) -> np.ndarray:
    with _opened(path) as file:
        return file.get_slice(name)[start:stop]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="np") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"{path}: truncated or corrupt ({error}); download or export the file again"
        ) from error


def write(
    path: str | Path,
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Writes a safetensors file; after a failure the old file, if any, is unchanged.

    Args:
        path: the file; its folder must exist.
        tensors: arrays of numpy or JAX, or lazy tensors, of which one at a time is in memory.
        metadata: text entries for the header.
        progress: called with the number of bytes of every tensor after it is written.

    Raises:
        ValueError: an array has a dtype outside `DTYPES`.
        OSError: the file cannot be written; its `filename` is `path`.
    """
    # The widest dtypes come first, so that every tensor is aligned to its items, as required.
    items = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    with replacing(path) as file:
        file.write(_header(dict(items), metadata))
        for _, value in items:
            array = np.ascontiguousarray(np.asarray(value))
            file.write(array.reshape(-1).view(np.uint8).data)
            if progress is not None:
                progress(array.nbytes)


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """Yields a temporary binary file that replaces `path` if the block raises no error.

    It lies beside `path`, since a rename is atomic within one file system only.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        # Not NamedTemporaryFile, whose mode 0600 would make a shared checkpoint unreadable.
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.filename is None:  # the error of a full disk, for example
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _header(arrays: Mapping[str, Any], metadata: Mapping[str, str] | None) -> bytes:
    """Returns the header: length (8 bytes) and JSON, padded with spaces so that data is aligned."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, array in arrays.items():
        if array.dtype.name not in DTYPES:
            raise ValueError(
                f"{name} has dtype {array.dtype.name}; cast it to one of {', '.join(DTYPES)}"
            )
        start, end = end, end + math.prod(array.shape) * array.dtype.itemsize
        entries[name] = {
            "dtype": DTYPES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
