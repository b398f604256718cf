"""Reads and writes torch's `pytorch_model.bin` without torch.

Such a file is a zip archive with a pickle that describes the tensors and one entry with the bytes
of each storage. A pickle can name any function to call; this reader allows only the few names that
rebuild tensors and refuses all others, so it never runs code from the file.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import math
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from eagle_jax.checkpoint.lazy_tensor import LazyTensor
from eagle_jax.checkpoint.safetensors import replacing

_AGAIN = "save it with safetensors, or with torch.save of its state_dict()"

_STORAGES = {
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}


@dataclasses.dataclass(frozen=True)
class _Storage:
    """A storage: one entry of the archive, which holds the numbers of one or more tensors."""

    entry: str
    dtype: np.dtype
    length: int  # in items


def stored(path: str | Path) -> dict[str, LazyTensor]:
    """Returns the tensors that `torch.save(model.state_dict(), path)` wrote, as lazy tensors.

    Raises:
        ValueError: the file is missing, truncated or corrupt, has torch's format before 1.6,
            contains anything but tensors, or its pickle calls other code.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            start = file.read(4)
        if start != b"PK\x03\x04":
            raise ValueError(_no_archive(path, start))
        with zipfile.ZipFile(path) as archive:
            found = _Unpickler(path, archive).load()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; give the path of a pytorch_model.bin") from None
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: truncated or corrupt ({error}); download it again") from error
    except (ValueError, PermissionError):
        raise
    except Exception as error:  # a damaged pickle may raise anything
        text = str(error).splitlines()[:1] or [type(error).__name__]
        raise ValueError(f"{path}: no readable state_dict ({text[0]}); {_AGAIN}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds a {type(found).__name__}, no state_dict; {_AGAIN}")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, LazyTensor):
            kind = type(value).__name__
            raise ValueError(f"{path}: {name} is a {kind}, no tensor; {_AGAIN}")
    return dict(found)


def write(
    path: str | Path,
    tensors: Mapping[str, Any],
    progress: Callable[[int], object] | None = None,
) -> None:
    """Writes a file that `torch.load(path)` reads as a state_dict, also with `weights_only=True`.

    After a failure the old file, if any, is unchanged.

    Args:
        path: the file; its folder must exist.
        tensors: arrays of numpy or JAX, or lazy tensors, of which one at a time is in memory.
        progress: called with the number of bytes of every tensor after it is written.

    Raises:
        ValueError: torch has no storage type for the dtype of an array.
        OSError: the file cannot be written; its `filename` is `path`.
    """
    root = Path(path).stem
    with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
        # `ZipInfo` entries have a fixed date, so that equal tensors give equal files.
        archive.writestr(zipfile.ZipInfo(f"{root}/data.pkl"), _pickled(tensors))
        archive.writestr(zipfile.ZipInfo(f"{root}/byteorder"), "little")
        for number, value in enumerate(tensors.values()):
            array = np.ascontiguousarray(np.asarray(value))
            info = zipfile.ZipInfo(f"{root}/data/{number}")
            with archive.open(info, "w", force_zip64=True) as entry:
                entry.write(array.reshape(-1).view(np.uint8).data)
            if progress is not None:
                progress(array.nbytes)
        archive.writestr(zipfile.ZipInfo(f"{root}/version"), "3\n")


def _pickled(tensors: Mapping[str, Any]) -> bytes:
    """Returns the pickle of a state_dict as torch writes it, a dict of `_rebuild_tensor_v2` calls.

    The opcodes are written by hand, because `pickle` can only name functions that can be imported.
    """
    out = [pickle.PROTO, b"\x02", pickle.EMPTY_DICT, pickle.MARK]
    for number, (name, value) in enumerate(tensors.items()):
        names = [key for key, dtype in _STORAGES.items() if dtype == value.dtype]
        if not names:
            raise ValueError(f"{name} has dtype {value.dtype.name}, which no torch storage has")
        shape, size = tuple(value.shape), math.prod(value.shape)
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        storage = [_text("storage"), _global("torch", names[0]), _text(str(number)), _text("cpu")]
        unused_hooks = _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
        arguments = [
            _tuple([*storage, _integer(size)]) + pickle.BINPERSID,
            _integer(0),
            _tuple(map(_integer, shape)),
            _tuple(map(_integer, strides)),
            pickle.NEWFALSE,  # no gradient
            unused_hooks,
        ]
        rebuild = _global("torch._utils", "_rebuild_tensor_v2")
        out += [_text(name), rebuild, _tuple(arguments), pickle.REDUCE]
    return b"".join([*out, pickle.SETITEMS, pickle.STOP])


def _text(text: str) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(text.encode())) + text.encode()


def _integer(number: int) -> bytes:
    count = number.bit_length() // 8 + 1
    return pickle.LONG1 + bytes([count]) + number.to_bytes(count, "little", signed=True)


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _tuple(items: Iterable[bytes]) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE


class _Unpickler(pickle.Unpickler):
    """An unpickler that can rebuild tensors and nothing else."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self.path, self.sizes = path, {info.filename: info.file_size for info in archive.infolist()}
        pickles = [
            name for name in self.sizes if name.count("/") == 1 and name.endswith("data.pkl")
        ]
        if len(pickles) != 1:
            raise ValueError(f"{path}: no file of torch.save; {_AGAIN}")
        self.root = pickles[0].removesuffix("data.pkl")
        order = f"{self.root}byteorder"
        if order in self.sizes and archive.read(order) != b"little":
            raise ValueError(f"{path}: numbers are not little-endian; {_AGAIN}")
        super().__init__(io.BytesIO(archive.read(pickles[0])))

    def find_class(self, module: str, name: str, /) -> Any:
        # New objects at each call, so that a pickle cannot modify objects of ours.
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return functools.partial(_tensor, self.path)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, requires_grad, hooks: data
        if module == "torch" and name in _STORAGES:
            return name
        if name.lower().startswith("float8") or name == "_rebuild_tensor_v3":
            raise ValueError(
                f"{self.path}: has tensors of a quantised dtype (float8 or the like), which are "
                "not read; give the model as it was before it was quantised"
            )
        raise ValueError(
            f"{self.path}: pickle with code in it ({module}.{name}): refused; {_AGAIN}"
        )

    def persistent_load(self, pid: Any, /) -> _Storage:
        kind, storage, key, _, length = pid
        entry = f"{self.root}data/{key}"
        dtype = _STORAGES[storage]
        if kind != "storage" or self.sizes.get(entry, -1) < length * dtype.itemsize:
            raise ValueError(
                f"{self.path}: truncated or corrupt (storage {key} lacks bytes); download it again"
            )
        return _Storage(entry, dtype, length)


def _tensor(
    path: Path,
    storage: _Storage,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    *unused: Any,
) -> LazyTensor:
    """Returns the tensor of torch's `_rebuild_tensor_v2`; offset and strides count items."""
    del unused  # requires_grad, hooks
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    inside = min(offset, *shape, *strides, 0) >= 0 and offset + last < storage.length
    if not inside and math.prod(shape):
        raise ValueError(f"{path}: truncated or corrupt (a tensor leaves its storage)")
    load = functools.partial(_load, path, storage, offset, last + 1, shape, strides)
    return LazyTensor(tuple(shape), storage.dtype, load)


def _load(
    path: Path,
    storage: _Storage,
    offset: int,
    length: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
) -> np.ndarray:
    width = storage.dtype.itemsize
    if math.prod(shape) == 0:
        return np.zeros(shape, storage.dtype)
    try:
        with zipfile.ZipFile(path) as archive, archive.open(storage.entry) as entry:
            entry.seek(offset * width)
            numbers = np.frombuffer(entry.read(length * width), storage.dtype)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError) as error:
        raise ValueError(f"{path}: truncated or corrupt ({error}); download it again") from error
    if len(numbers) != length:
        raise ValueError(f"{path}: truncated or corrupt ({storage.entry}); download it again")
    steps = [stride * width for stride in strides]
    view = np.lib.stride_tricks.as_strided(numbers, shape, steps, writeable=False)
    return view if view.flags.c_contiguous else np.ascontiguousarray(view)


def _no_archive(path: Path, start: bytes) -> str:
    if start[:1] == b"\x80":  # a bare pickle
        return f"{path}: torch's format before 1.6 is not read; {_AGAIN}"
    return f"{path}: truncated or corrupt (no zip archive); download it again"
