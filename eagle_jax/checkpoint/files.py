"""The two files of a model directory, `config.json` and its tensors, read and written whole."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eagle_jax.checkpoint import safetensors
from eagle_jax.checkpoint.names import Shape, disk_shapes, on_disk, shapes
from eagle_jax.config import DraftConfig

Arrays = dict[str, np.ndarray]

DTYPES = ("float32", "bfloat16", "float16")

# The second is what Medusa's training program writes.
_NAMES = ("model.safetensors", "medusa_lm_head.safetensors")


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds; keys whose value is null count as absent.

    Raises:
        ValueError: no such file, or not one JSON object.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path}: no such file; give a Hugging Face model directory") from None
    except ValueError as error:  # of JSON and of UTF-8
        raise ValueError(f"{path}: not valid JSON ({error}); download the file again") from error
    if not isinstance(result, dict):
        raise ValueError(f"{path}: holds no JSON object; download the file again")
    return {key: value for key, value in result.items() if value is not None}


def read_tensors(directory: Path) -> Arrays:
    """All tensors of a directory, by their names on disk; they may be in several files.

    Raises:
        ValueError: a file is missing or corrupt.
    """
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        for name in _NAMES:
            if (directory / name).is_file():
                return safetensors.read(directory / name)
        raise ValueError(
            f"{directory}: has no model.safetensors; "
            "export the model again with safetensors (torch .bin files are not read)"
        )
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict):
        raise ValueError(f"{index}: has no weight_map; download the file again")
    tensors: Arrays = {}
    for name in sorted(set(files.values())):
        tensors |= safetensors.read(directory / name)
    return tensors


def write(
    directory: str | Path,
    config: DraftConfig,
    params: Mapping[str, Any],
    dtype: str,
    settings: Mapping[str, Any],
    tables: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Writes a model directory; creates it if missing, and only if nothing is wrong.

    Args:
        directory: receives `config.json` and `model.safetensors`.
        config: of the model.
        params: arrays with the names and shapes of `shapes(config)`.
        dtype: of the weights on disk, one of `DTYPES`.
        settings: content of `config.json`.
        tables: further tensors, written as they are.

    Raises:
        ValueError: `params` don't match `config`, or an unknown dtype.
    """
    check_params(config, params, dtype)
    tensors = dict(tables or {})
    for name, (disk, transposed) in on_disk(config).items():
        array = np.asarray(params[name]).astype(dtype)
        tensors[disk] = array.T if transposed else array
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    safetensors.write(directory / "model.safetensors", tensors, {"format": "pt"})
    with safetensors.replacing(directory / "config.json") as file:
        file.write(json.dumps(settings, indent=2).encode() + b"\n")


def check_params(config: DraftConfig, params: Mapping[str, Any], dtype: str) -> None:
    """Raises ValueError where `write` would."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: must be one of {', '.join(DTYPES)}")
    found = {name: np.shape(value) for name, value in params.items()}
    _compare("params", found, shapes(config))


def arrays(
    directory: Path, config: DraftConfig, tensors: Mapping[str, np.ndarray], *ignored: str
) -> Arrays:
    """The weights of `config` by their Flax names, from tensors by their names on disk.

    Raises:
        ValueError: a tensor is missing, unexpected (unless `ignored`) or of a wrong shape.
    """
    found = {
        name: array.shape
        for name, array in tensors.items()
        # A buffer that transformers 4.30 and older stored; it follows from rope_theta.
        if name not in ignored and not name.endswith("rotary_emb.inv_freq")
    }
    _compare(str(directory), found, disk_shapes(config))
    return {
        name: tensors[disk].T if transposed else tensors[disk]
        for name, (disk, transposed) in on_disk(config).items()
    }


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
