"""Reads and writes the files of a model directory; a directory appears complete or not at all."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import math
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eagle_jax import outputs
from eagle_jax.checkpoint import safetensors, torch_bin
from eagle_jax.checkpoint.lazy_tensor import LazyTensor, cast, lazily
from eagle_jax.checkpoint.names import Shape, disk_shapes, on_disk, shapes
from eagle_jax.config import DraftConfig
from eagle_jax.drafters import registry

Arrays = dict[str, np.ndarray]
LazyTensors = dict[str, LazyTensor]

DTYPES = ("float32", "bfloat16", "float16")

_SAFETENSORS, _TORCH = "model.safetensors", "pytorch_model.bin"
_ENDINGS = (".safetensors", ".bin", ".pt")


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file, without the keys whose value is null.

    Raises:
        ValueError: there is no such file, or it does not hold one JSON object.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path}: no such file; give a Hugging Face model directory") from None
    except (ValueError, RecursionError) as error:  # bad JSON or UTF-8; nested too deeply
        raise ValueError(f"{path}: not valid JSON ({error}); download the file again") from error
    if not isinstance(result, dict):
        raise ValueError(f"{path}: holds no JSON object; download the file again")
    return {key: value for key, value in result.items() if value is not None}


def read_tensors(directory: Path) -> LazyTensors:
    """Returns the tensors of a directory, in one or several files, by name on disk; reads none yet.

    If there are safetensors and torch files, the safetensors files are taken.

    Raises:
        ValueError: a file is missing or corrupt, or a torch file contains code.
    """
    others = [name for spec in registry.specs().values() for name in spec.checkpoint().other_names]
    for usual, read in ((_SAFETENSORS, safetensors.stored), (_TORCH, torch_bin.stored)):
        index = directory / f"{usual}.index.json"
        if index.is_file():
            return _indexed(index, read)
        safe = read is safetensors.stored
        own = [name for name in others if name.endswith(".safetensors") == safe]
        for name in (usual, *own):
            if (directory / name).is_file():
                return read(directory / name)
        shards = _shards(directory, usual)
        if shards:
            return _merged(directory, shards, read)
    raise ValueError(
        f"{directory}: has no model.safetensors; "
        "export the model again with it (pytorch_model.bin is read too)"
    )


def _indexed(index: Path, read: Callable[[Path], LazyTensors]) -> LazyTensors:
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{index}: has no weight_map; download the file again")
    for name in files.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{index}: names a shard {name!r}; download the file again")
        if not (index.parent / name).is_file():
            raise ValueError(f"{index.parent}: lacks {name}, which {index.name} lists; download it")
    tensors = _merged(index.parent, sorted(set(files.values())), read)
    absent = sorted(files.keys() - tensors.keys())
    if absent:
        raise ValueError(
            f"{index.parent / files[absent[0]]}: lacks tensors {_some(absent)}, which "
            f"{index.name} lists; download the files again"
        )
    return tensors


def _shards(directory: Path, name: str) -> list[str]:
    """Returns the names of shards (`model-00001-of-00002.safetensors`, ...) that have no index.

    The list is complete, or empty if there are no shards.
    """
    stem, suffix = name.split(".")
    found = [path.name for path in directory.glob(f"{stem}-*-of-*.{suffix}")]
    counted = [re.fullmatch(rf"{stem}-\d{{5}}-of-(\d{{5}})\.{suffix}", name) for name in found]
    counts = {match[1] for match in counted if match}
    if not counts:
        return []
    count = max(counts)
    expected = [f"{stem}-{i:05d}-of-{count}.{suffix}" for i in range(1, int(count) + 1)]
    for shard in expected:
        if shard not in found:
            raise ValueError(f"{directory}: lacks {shard}, though there are others; download it")
    return expected


def _merged(
    directory: Path, names: Sequence[str], read: Callable[[Path], LazyTensors]
) -> LazyTensors:
    tensors: LazyTensors = {}
    for name in names:
        found = read(directory / name)
        twice = sorted(tensors.keys() & found.keys())
        if twice:
            raise ValueError(
                f"{directory / name}: {twice[0]} is in another shard too; download the files again"
            )
        tensors |= found
    return tensors


def check_new(directory: Path) -> None:
    """Raises the ValueError that `staged` would raise, before any work is done."""
    if directory.name in ("", "..") or directory.is_symlink():
        raise ValueError(f"{directory}: is no name for a new directory; give one that is not there")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory}: exists and is not empty; give another place or remove it")


@contextlib.contextmanager
def staged(directory: str | Path) -> Iterator[Path]:
    """Yields a temporary directory that is renamed to `directory` if the block raises no error.

    It lies beside `directory`, since a rename is atomic within one file system only. After an error
    it is deleted; what a killed run left under the same name is deleted too.

    Raises:
        ValueError: `directory` exists and is not empty.
        OSError: the directory cannot be written.
    """
    directory = Path(directory)
    check_new(directory)
    temporary = directory.parent / f".{directory.name}.{secrets.token_hex(4)}.tmp"
    made = _make_parents(directory.parent)
    done = False
    try:
        with outputs.locked("output", directory):
            leftovers = f".{glob.escape(directory.name)}.{'[0-9a-f]' * 8}.tmp"
            for path in directory.parent.glob(leftovers):
                shutil.rmtree(path, ignore_errors=True)
            temporary.mkdir()
            yield temporary
            temporary.replace(directory)
            done = True
    except OSError as error:
        told = _of_place(error, temporary, directory)
        if told is None:
            raise
        raise told from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for path in [] if done else made:
            path.rmdir()


def _of_place(error: OSError, temporary: Path, directory: Path) -> OSError | None:
    """Returns an error about the temporary directory as one about the user's, with a remedy."""
    for name in map(str, (error.filename2, error.filename)):
        if name.startswith(str(temporary)) or name == str(directory):
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            remedy = "make room there" if full else "make it writable"
            where = name.replace(str(temporary), str(directory), 1)
            return OSError(error.errno, f"{error.strerror}; {remedy} or give another place", where)
    return None


def _make_parents(directory: Path) -> list[Path]:
    """Creates missing parent directories and returns those created, the innermost first."""
    made: list[Path] = []
    for path in reversed([directory, *directory.parents]):
        if not path.exists():
            path.mkdir()
            made.insert(0, path)
    return made


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file; after a failure the old file, if any, is unchanged."""
    with safetensors.replacing(path) as file:
        file.write(json.dumps(content, indent=2).encode() + b"\n")


def write(
    directory: str | Path,
    config: DraftConfig,
    params: Mapping[str, Any],
    dtype: str,
    settings: Mapping[str, Any],
    tables: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Writes `config.json` and `model.safetensors`; checks its arguments before it creates files.

    Args:
        directory: the model directory; created if missing.
        config: configuration of the model.
        params: arrays with the names and shapes of `shapes(config)`.
        dtype: dtype of the weights on disk, one of `DTYPES`.
        settings: content of `config.json`.
        tables: further tensors, written unchanged.

    Raises:
        ValueError: `params` don't match `config`, or the dtype is unknown.
    """
    check_params(config, params, dtype)
    tensors = {**(tables or {}), **disk_tensors(config, params, dtype)}
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    safetensors.write(directory / "model.safetensors", tensors, {"format": "pt"})
    write_json(directory / "config.json", settings)


def write_index(directory: Path, tensors: Mapping[str, Any]) -> None:
    """Writes `model.safetensors.index.json` beside a single `model.safetensors`.

    transformers does not need it, but the official EAGLE code finds the target's embedding by it.
    """
    total = sum(math.prod(x.shape) * x.dtype.itemsize for x in tensors.values())
    names = dict.fromkeys(sorted(tensors), _SAFETENSORS)
    content = {"metadata": {"total_size": total}, "weight_map": names}
    write_json(directory / f"{_SAFETENSORS}.index.json", content)


def disk_tensors(config: DraftConfig, params: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Returns the weights of `params` by name on disk; each is cast and transposed when read."""
    tensors = {}
    for name, (disk, transposed) in on_disk(config).items():
        array = cast(disk, lazily(params[name]), dtype)
        tensors[disk] = array.T if transposed else array
    return tensors


def check_counts(
    directory: Path, settings: Mapping[str, Any], keys: Sequence[str], tensors: LazyTensors
) -> None:
    """Raises ValueError if a count in `config.json` (of layers, say) exceeds the number of tensors.

    This check comes before the comparison of names and shapes, for which a wrong count could
    generate millions of names.
    """
    for key in keys:
        if isinstance(settings.get(key), int) and settings[key] > len(tensors):
            raise ValueError(
                f"{directory / 'config.json'}: {key}={settings[key]}: the files have "
                f"{len(tensors)} tensors; both must belong to the same model"
            )


def check_params(config: DraftConfig, params: Mapping[str, Any], dtype: str) -> None:
    """Raises the ValueError that `write` would raise."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: must be one of {', '.join(DTYPES)}")
    found = {name: np.shape(value) for name, value in params.items()}
    _compare("params", found, shapes(config))


def arrays(
    directory: Path, config: DraftConfig, tensors: Mapping[str, LazyTensor], *ignored: str
) -> LazyTensors:
    """Returns the weights of `config` by Flax name, from tensors by name on disk.

    Raises:
        ValueError: a tensor is missing, unexpected (unless `ignored`) or of a wrong shape.
    """
    found = {
        name: array.shape
        for name, array in tensors.items()
        # transformers 4.30 and older stored this buffer, which rope_theta determines.
        if name not in ignored and not name.endswith("rotary_emb.inv_freq")
    }
    _compare(str(directory), found, disk_shapes(config))
    for name in found:
        if tensors[name].dtype.kind in "iub":
            raise ValueError(
                f"{directory}: {name} is {tensors[name].dtype.name}, a quantised weight; give the "
                "model as it was before it was quantised"
            )
    return {
        name: tensors[disk].T if transposed else tensors[disk]
        for name, (disk, transposed) in on_disk(config).items()
    }


def in_memory(params: Mapping[str, LazyTensor | np.ndarray]) -> Arrays:
    """Reads all tensors into memory and returns them."""
    return {name: np.asarray(array) for name, array in params.items()}


def _compare(where: str, found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> None:
    for problem, names in (
        ("lacks tensors", expected.keys() - found.keys()),
        ("has unexpected tensors", found.keys() - expected.keys()),
    ):
        if names:
            raise ValueError(
                f"{where}: {problem} {_some(sorted(names))}; "
                "the configuration and the weights must belong to the same model"
            )
    for name, shape in expected.items():
        if found[name] != shape:
            raise ValueError(
                f"{where}: {name} has shape {found[name]}, the configuration implies {shape}; "
                "both must belong to the same model"
            )


def _some(names: Sequence[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
