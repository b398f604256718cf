"""The store of tunings: the fastest methods that `eagle-jax tune` found.

`tuning.json` lies beside the model, or in the user's cache if that directory is not writable. It
has an entry per device, dtype, batch size (rounded up to a power of two), greedy or sampled
decoding, and weights. Entries for other weights or drafts are ignored, even in the same directory.
"""

from __future__ import annotations

import errno
import functools
import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from eagle_jax import fingerprint, outputs, sharding
from eagle_jax.checkpoint import files
from eagle_jax.decode import method_cli
from eagle_jax.decode.method import Method
from eagle_jax.params import Params, shipped_name

FILE = "tuning.json"
_FORMAT = {"format": "eagle_jax tuning", "version": 1}
_COMMAND = "eagle-jax tune"

Entry = dict[str, Any]


def key(params: Params, rows: int, temperature: float) -> dict[str, Any]:
    """Returns an entry's key: device, dtype, rows, greedy or sampled, and a hash of the weights."""
    dtypes = {array.dtype.name for array in params.target.values()}
    return {
        "device": device(params),
        "dtype": "+".join(sorted(dtypes)),  # quantised weights have two or more dtypes
        "rows": 1 << (rows - 1).bit_length(),
        "decoding": "sampled" if temperature > 0 else "greedy",
        "weights": fingerprint.of_params(params),
    }


def device(params: Params) -> str:
    """Returns the device's name, with the usable cores of a CPU and the axes of a mesh."""
    name = jax.devices()[0].device_kind
    if jax.default_backend() == "cpu":
        name = f"{_processor()}, {_cores()} cores"
    mesh = sharding.mesh_of(params.target)
    if mesh is not None:
        name += ", " + " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return name


@functools.cache
def _processor() -> str:
    """Returns the processor's name, which Linux provides only in a file."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def places(params: Params) -> list[Path]:
    """Returns the files that may hold the model's tuning, the preferred one first."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    own = [] if params.directory is None else [params.directory / FILE]
    return [*own, cache / "eagle_jax" / "tuning" / f"{fingerprint.of_params(params)}.json"]


def entries(path: Path) -> list[Entry]:
    """Returns the entries of a file, or an empty list if it does not exist.

    Raises:
        ValueError: the file cannot be read or is not a tuning; one line.
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
    """Adds entries, which replace those with the same keys, and returns the file.

    Raises:
        ValueError: the existing file is not a tuning.
        OSError: no file can be written.
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
    with outputs.locked("tuning", path, wait=True):  # two processes may tune at the same time
        kept = [entry for entry in entries(path) if entry["key"] not in keys]
        files.write_json(path, {**_FORMAT, "entries": [*kept, *added]})
    return path


def find(params: Params, rows: int, temperature: float) -> Entry | None:
    """Returns the newest entry for these weights on this device, or None."""
    wanted = key(params, rows, temperature)
    return max(_matching(params, wanted), key=lambda entry: entry["tuned"], default=None)


def _matching(params: Params, wanted: Mapping[str, Any]) -> Iterator[Entry]:
    for path in places(params):
        for entry in entries(path):
            if all(entry["key"].get(name) == value for name, value in wanted.items()):
                yield {**entry, "path": str(path)}


def method(params: Params, rows: int, temperature: float) -> Method:
    """Returns the stored method.

    Raises:
        ValueError: there is none for these weights on this device (the message names the command
            that creates it), or its file is damaged.
    """
    entry = find(params, rows, temperature)
    if entry is None:
        raise ValueError(_missing(params, rows, temperature))
    return _parsed(entry, params, rows, temperature)


def table(params: Params, rows: int, temperature: float) -> dict[int, Method]:
    """Returns the stored methods by batch size: for `rows`, and for smaller sizes if there are any.

    Raises:
        ValueError: as in `method`; there must be an entry for `rows`.
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
    """Returns the command line that tunes `params`; it leaves out drafts given by `draft=`."""
    where = "MODEL" if params.directory is None else shipped_name(params.directory)
    words = f"{_COMMAND} --model {where} --temperature {temperature:g}"
    words += f" --batch-size {rows}" if rows > 1 else ""
    words += f" --quantize {params.quantize}" if params.quantize else ""
    words += f" --quantize-drafts {params.quantize_drafts}" if params.quantize_drafts else ""
    dtype = next(iter(params.target.values())).dtype.name
    default = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return words + (f" --dtype {dtype}" if dtype != default else "")
