"""The format of stored target features, and reading them together with the text.

A directory holds `train/` and `validation/`, each with a manifest and ArrayRecord files. Row `i` of
the prepared text has record `i % rows_per_file` of file `i // rows_per_file`, whichever process
wrote the file. A record holds the tokens of its row without padding. For int8 it starts with the
scales, float32 [tokens, n]. Then come the features [tokens, n, d] of the `n` streams (those that
enter `layers`, and last the features after the final norm).

The manifest lists everything that the features depend on. Training compares it with its own
configuration. The manifest's hash is stored in checkpoints, so a run cannot resume with other
features.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from eagle_jax import fingerprint
from eagle_jax.checkpoint import files, hf
from eagle_jax.checks import check_whole, short
from eagle_jax.config import NextToken, TrainConfig
from eagle_jax.train import data
from eagle_jax.train.objectives import target, target_directory

# Increase when the records of the same manifest change.
FORMAT = 1
MANIFEST = "manifest.json"
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "int8": np.dtype(np.int8)}
_SCALE = np.dtype("<f4")
_WRITER = "python -m eagle_jax.train.features"

Manifest = dict[str, Any]


def manifest(
    config: TrainConfig, field: str, *, dtype: str, rows_per_file: int
) -> tuple[Manifest, Any]:
    """Returns the manifest of the features that `config` needs, and the prepared rows.

    Args:
        config: configuration of a draft's training; its text is prepared first if necessary.
        field: "train" or "validation".
        dtype: a name in `DTYPES`.
        rows_per_file: prepared rows in one file.

    Raises:
        ValueError: the target is missing, or a field of the configuration or the text is wrong.
    """
    settings = config.objective
    assert not isinstance(settings, NextToken)
    directory = target_directory(settings.target)
    target_config = dataclasses.asdict(hf.open_target(directory)[0])
    text, rows = data.rows(config.data, field)
    return {
        "format": FORMAT,
        "sequence_length": config.data.sequence_length,
        "text": text,
        "rows": len(rows),
        "rows_per_file": rows_per_file,
        "weights": fingerprint.of_weight_files(directory),
        "target": json.loads(json.dumps(target_config)),  # as `read_manifest` will read it
        "layers": list(target.layers(settings)),
        "dtype": dtype,
        "compute_dtype": config.compute_dtype,
    }, rows


def read_manifest(path: Path) -> Manifest:
    """Reads a manifest and checks the types of its fields.

    Raises:
        ValueError: the manifest is damaged, or another version wrote it.
    """
    found = files.read_json(path)
    if found.get("format") != FORMAT or found.get("dtype") not in [*DTYPES]:
        raise ValueError(
            f"{path}: has format {short(found.get('format'))} and dtype "
            f"{short(found.get('dtype'))}, known are {FORMAT} and {', '.join(DTYPES)}; write the "
            "features again"
        )
    layers, target = found.get("layers"), found.get("target")
    try:
        for name in ("rows", "rows_per_file", "sequence_length"):
            check_whole(name, found.get(name))
        if not isinstance(layers, list) or any(type(layer) is not int for layer in layers):
            raise ValueError(f"layers={short(layers)}: must be a list of layer numbers")
        if not isinstance(target, dict):
            raise ValueError(f"target={short(target)}: must be an object")
    except ValueError as error:
        raise ValueError(f"{path}: {error}; write the features again") from error
    return found


def digest(made: Manifest) -> str:
    """Returns the hash of a manifest."""
    return fingerprint.of_json(made)


def paths(folder: Path, made: Manifest) -> list[Path]:
    """Returns the paths of a manifest's files, in the order of their rows."""
    first = range(0, made["rows"], made["rows_per_file"])
    return [folder / f"rows-{number:09d}.array_record" for number in first]


def differences(found: Manifest, wanted: Manifest) -> list[tuple[str, Any, Any]]:
    """Returns (name, found value, wanted value) of fields that differ; as "target.X" in the target.

    Target fields that only one manifest has are ignored: a newer version added them, and its
    defaults keep the old behaviour.
    """
    names = [name for name in wanted if name != "target"]
    pairs = [(name, found.get(name), wanted[name]) for name in names]
    old, new = found["target"], wanted["target"]
    pairs += [(f"target.{name}", old[name], new[name]) for name in new if name in old]
    return [(name, one, two) for name, one, two in pairs if one != two]


@dataclasses.dataclass(frozen=True)
class Features:
    """The stored features of one text, read on demand.

    Attributes:
        folder: the folder of the files.
        manifest: the manifest of the files.
        streams: indices of the stored streams to read, in this order.
        source: the records by row number; it can be pickled, because grain's workers read it too.
    """

    folder: Path
    manifest: Mapping[str, Any]
    streams: tuple[int, ...]
    source: Any = dataclasses.field(repr=False)

    def read(self, number: int, tokens: int) -> data.Row:
        """Returns a row's `features` [t, n, d] and int8's `scales` [t, n]; zero past its tokens.

        Raises:
            ValueError: the record is damaged.
        """
        made = self.manifest
        stored, width = len(made["layers"]) + 1, made["target"]["hidden_size"]
        dtype, length = DTYPES[made["dtype"]], made["sequence_length"]
        shapes = {"features": ((tokens, stored, width), dtype)}
        if made["dtype"] == "int8":
            shapes = {"scales": ((tokens, stored), _SCALE), **shapes}
        try:
            record = self.source[number]
        except RuntimeError as error:
            raise self._damaged(number, str(error)) from error
        size = sum(math.prod(shape) * kind.itemsize for shape, kind in shapes.values())
        if len(record) != size:
            raise self._damaged(number, f"{len(record)} bytes where {tokens} tokens take {size}")
        row, at = {}, 0
        for name, (shape, kind) in shapes.items():
            count = math.prod(shape)
            array = np.frombuffer(record, kind, count, at).reshape(shape)
            row[name] = np.zeros((length, len(self.streams), *shape[2:]), kind)
            row[name][:tokens] = array[:, list(self.streams)]
            at += count * kind.itemsize
        return row

    def _damaged(self, number: int, how: str) -> ValueError:
        path = paths(self.folder, dict(self.manifest))[number // self.manifest["rows_per_file"]]
        return ValueError(
            f"{path}: the features of row {number} cannot be read ({how}); delete the file and run "
            f"`{_WRITER}` again, which writes what is missing"
        )


def record(arrays: Mapping[str, np.ndarray], row: int, tokens: int) -> bytes:
    """Returns the record of a row of `target.compress`: its first `tokens` tokens as bytes."""
    parts = [arrays["features"][row, :tokens].tobytes()]
    if "scales" in arrays:
        parts.insert(0, arrays["scales"][row, :tokens].astype(_SCALE).tobytes())
    return b"".join(parts)


def find(config: TrainConfig) -> dict[str, Features]:
    """Returns the stored features of a run's texts: "train", and "validation" if it is used.

    The result is empty if the target runs online.

    Raises:
        ValueError: features are missing, or were made with another target, text, layers or sequence
            length.
    """
    if isinstance(config.objective, NextToken) or not config.objective.features:
        return {}
    used = ["train"]
    if config.eval_every and config.data.validation:
        used.append("validation")
    return {field: _find(config, field, Path(config.objective.features)) for field in used}


def contents(stored: Mapping[str, Features]) -> dict[str, str]:
    """Returns what checkpoints store for `objective.features`: a hash, since folders may move."""
    if "train" not in stored:
        return {}
    return {"objective.features": f"manifest {digest(dict(stored['train'].manifest))[:16]}"}


def _find(config: TrainConfig, field: str, directory: Path) -> Features:
    assert not isinstance(config.objective, NextToken)
    folder = directory.expanduser() / field
    where = f"objective.features={str(directory)!r}"
    write = f"write them with `{_WRITER} --config CONFIG --output {directory}`"
    if not (folder / MANIFEST).is_file():
        besides = ", or set eval_every=0" if field == "validation" else ""
        raise ValueError(f"{where}: has no {field}/{MANIFEST}; {write}{besides}")
    found = read_manifest(folder / MANIFEST)
    dtype, rows_per_file = found["dtype"], found["rows_per_file"]
    wanted, _ = manifest(config, field, dtype=dtype, rows_per_file=rows_per_file)
    for name, theirs, ours in differences(found, wanted):
        if name == "compute_dtype":  # differs only by rounding, as the stored dtype does
            continue
        if name == "layers" and set(ours) <= set(theirs):  # additional stored layers are ignored
            continue
        raise ValueError(
            f"{where}: {_SAID.get(name, name).format(field)} was {_short(theirs)} when the {field} "
            f"features were written and is {_short(ours)} now; set it back, or write features of "
            "it into another directory"
        )
    _complete(folder, found, where)
    streams = [found["layers"].index(layer) for layer in wanted["layers"]]
    return Features(folder, found, (*streams, len(found["layers"])), _open(folder, found))


# How error messages name a manifest's fields.
_SAID = {
    "text": "data.{0}'s text",
    "rows": "data.{0}'s number of rows",
    "sequence_length": "data.sequence_length",
    "weights": "the weights' hash of objective.target",
    "layers": "objective.draft.aux_layers",
}


def _short(value: Any) -> str:
    return f"{value[:16]}..." if isinstance(value, str) and len(value) > 16 else repr(value)


def _complete(folder: Path, made: Manifest, where: str) -> None:
    every = paths(folder, made)
    missing = [path.name for path in every if not path.is_file()]
    if missing:
        named = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ValueError(
            f"{where}: lacks {len(missing)} of {len(every)} files of {folder.name}/ ({named}); "
            f"run `{_WRITER}` again, which writes what is missing (every shard of it)"
        )


def _open(folder: Path, made: Manifest) -> Any:
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    names = [str(path) for path in paths(folder, made)]
    try:
        source = ArrayRecordDataSource(names)
    except RuntimeError as error:
        for path in names:
            try:
                ArrayRecordDataSource([path])
            except RuntimeError as reason:
                raise ValueError(
                    f"{path}: cannot be read ({reason}); delete it and run `{_WRITER}` again, "
                    "which writes what is missing"
                ) from reason
        raise ValueError(f"{folder}: cannot be read ({error})") from error
    if len(source) != made["rows"]:
        raise ValueError(
            f"{folder}: has {len(source)} rows, its {MANIFEST} says {made['rows']}; delete it and "
            f"run `{_WRITER}` again"
        )
    return source
