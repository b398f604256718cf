"""What `eagle-jax tune` found to be the fastest method: stored, and found again.

`tuning.json` lies beside the model, or in the user's cache where that cannot be written. It has an
entry per device, dtype, batch size (rounded up to a power of two), greedy or sampled decoding, and
weights. Of other weights or drafts, even in the same place, nothing is used.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from eagle_jax import outputs, sharding
from eagle_jax.checkpoint import files
from eagle_jax.decode import method_cli
from eagle_jax.decode.method import Method
from eagle_jax.layout import Layout
from eagle_jax.params import Params, shipped_name
from eagle_jax.types import ParamDict

FILE = "tuning.json"
_FORMAT = {"format": "eagle_jax tuning", "version": 1}
_CORNER = 64  # values of every matrix that tell weights apart
_COMMAND = "eagle-jax tune"

Entry = dict[str, Any]


def key(params: Params, rows: int, temperature: float) -> dict[str, Any]:
    """What an entry is for: device, dtype, rows, greedy or sampled, and a hash of the weights."""
    dtypes = {array.dtype.name for array in params.target.values()}
    return {
        "device": device(params),
        "dtype": "+".join(sorted(dtypes)),  # two or more where weights are quantised
        "rows": 1 << (rows - 1).bit_length(),
        "decoding": "sampled" if temperature > 0 else "greedy",
        "weights": fingerprint(params),
    }


def device(params: Params) -> str:
    """What the model lies on: of CPUs the model and the usable cores, of a mesh its axes."""
    name = jax.devices()[0].device_kind
    if jax.default_backend() == "cpu":
        name = f"{_processor()}, {_cores()} cores"
    mesh = sharding.mesh_of(params.target)
    if mesh is not None:
        name += ", " + " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return name


@functools.cache
def _processor() -> str:
    """The processor's name; Linux tells it in a file only."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fingerprint(params: Params) -> str:
    """Hashes target and drafts: configurations, layouts, all vectors, a corner of every matrix."""
    digest = hashlib.sha256()
    models: list[tuple[str, Any, Layout, ParamDict]] = [
        ("target", params.target_config, params.layout, params.target),
        *(
            (kind, draft.config, draft.layout, draft.params)
            for kind, draft in sorted(params.drafts.items())
        ),
    ]
    for kind, config, layout, arrays in models:
        digest.update(f"{kind} {config} {layout}".encode())
        for name, array in sorted(_samples(arrays).items()):
            digest.update(name.encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:32]


def _samples(arrays: ParamDict) -> dict[str, np.ndarray]:
    vectors = {name: array for name, array in arrays.items() if array.ndim == 1}
    if jax.process_count() > 1:  # what of a matrix lies in other processes cannot be read
        return jax.device_get(vectors)
    matrices = {name: array for name, array in arrays.items() if array.ndim > 1}
    if jax.default_backend() == "cpu":  # numpy reads there what JAX would compile slices for
        matrices = {name: np.asarray(array) for name, array in matrices.items()}
    corners = {name: array[(0,) * (array.ndim - 1)][:_CORNER] for name, array in matrices.items()}
    return jax.device_get({**vectors, **corners})


def places(params: Params) -> list[Path]:
    """Files that may hold the model's tuning, the preferred one first."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    own = [] if params.directory is None else [params.directory / FILE]
    return [*own, cache / "eagle_jax" / "tuning" / f"{fingerprint(params)}.json"]


def entries(path: Path) -> list[Entry]:
    """The entries of a file; none if there is no file.

    Raises:
        ValueError: it cannot be read, or is no tuning; one line.
    """
    if not path.exists():
        return []
    remedy = f"delete it and run {_COMMAND} again"
    try:
        content = files.read_json(path)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; make it readable, or {remedy}") from error
    except ValueError as error:
        raise ValueError(f"{str(error).rpartition(';')[0]}; {remedy}") from error
    found = content.get("entries")
    if (
        any(content.get(name) != value for name, value in _FORMAT.items())
        or not isinstance(found, list)
        or not all(map(_is_entry, found))
    ):
        raise ValueError(f"{path}: is no tuning of this version of eagle_jax; {remedy}")
    return found


def _is_entry(entry: Any) -> bool:
    kinds = {"key": dict, "method": str, "tuned": str}
    fits = isinstance(entry, dict) and all(
        isinstance(entry.get(name), kind) for name, kind in kinds.items()
    )
    return fits and entry["method"].startswith("--method ")


def store(params: Params, added: list[Entry]) -> Path:
    """Adds entries, in the place of older ones of the same key; returns the file they went to.

    Raises:
        ValueError: the file there is no tuning.
        OSError: no place can be written.
    """
    *preferred, cache = places(params)
    for path in preferred:
        try:
            return _write(path, added)
        except PermissionError:
            continue
        except OSError as error:
            if error.errno != errno.EROFS:
                raise
    cache.parent.mkdir(parents=True, exist_ok=True)
    return _write(cache, added)


def _write(path: Path, added: list[Entry]) -> Path:
    keys = [entry["key"] for entry in added]
    with outputs.locked("tuning", path, wait=True):  # of two that tune, neither loses an entry
        kept = [entry for entry in entries(path) if entry["key"] not in keys]
        files.write_json(path, {**_FORMAT, "entries": [*kept, *added]})
    return path


def find(params: Params, rows: int, temperature: float) -> Entry | None:
    """The newest entry for these weights on this device."""
    wanted = key(params, rows, temperature)
    return max(_matching(params, wanted), key=lambda entry: entry["tuned"], default=None)


def _matching(params: Params, wanted: Mapping[str, Any]) -> Iterator[Entry]:
    for path in places(params):
        for entry in entries(path):
            if all(entry["key"].get(name) == value for name, value in wanted.items()):
                yield {**entry, "path": str(path)}


def method(params: Params, rows: int, temperature: float) -> Method:
    """The stored method.

    Raises:
        ValueError: there is none for these weights on this device (the message names the command
            that makes it), or its file is damaged.
    """
    entry = find(params, rows, temperature)
    if entry is None:
        raise ValueError(_missing(params, rows, temperature))
    return _parsed(entry, params, rows, temperature)


def table(params: Params, rows: int, temperature: float) -> dict[int, Method]:
    """The stored methods by batch size: of `rows`, and of smaller ones where there are any.

    Raises:
        ValueError: as `method`; an entry for `rows` there must be.
    """
    found = {rows: method(params, rows, temperature)}
    wanted = key(params, rows, temperature)
    del wanted["rows"]
    stored = list(_matching(params, wanted))
    for size in (1 << i for i in range((rows - 1).bit_length())):
        fitting = [entry for entry in stored if entry["key"].get("rows") == size]
        if fitting:
            newest = max(fitting, key=lambda entry: entry["tuned"])
            found[size] = _parsed(newest, params, size, temperature)
    return found


def _parsed(entry: Entry, params: Params, rows: int, temperature: float) -> Method:
    try:
        return method_cli.parse(entry["method"])
    except ValueError as error:
        raise ValueError(
            f"{entry['path']}: method {entry['method']!r}: {error}; run "
            f"{command(params, rows, temperature)}"
        ) from error


def _missing(params: Params, rows: int, temperature: float) -> str:
    wanted = key(params, rows, temperature)
    same = {name: value for name, value in wanted.items() if name != "weights"}
    changed = any(True for _ in _matching(params, same))
    what = f"{same['dtype']}, batch size {same['rows']}, {same['decoding']}, {same['device']}"
    why = "the tuning is of other weights or drafts" if changed else f"no tuning for {what}"
    return f"method='auto': {why}; run {command(params, rows, temperature)}"


def command(params: Params, rows: int, temperature: float) -> str:
    """The command line that tunes `params`; of drafts given by `draft=` it cannot know."""
    where = "MODEL" if params.directory is None else shipped_name(params.directory)
    words = f"{_COMMAND} --model {where} --temperature {temperature:g}"
    words += f" --batch-size {rows}" if rows > 1 else ""
    words += f" --quantize {params.quantize}" if params.quantize else ""
    words += f" --quantize-drafts {params.quantize_drafts}" if params.quantize_drafts else ""
    dtype = next(iter(params.target.values())).dtype.name
    default = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return words + (f" --dtype {dtype}" if dtype != default else "")
