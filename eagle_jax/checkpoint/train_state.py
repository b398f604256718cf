"""Checkpoints of a training run: weights, optimizer state, step, data position, configuration.

Written asynchronously by orbax, each complete or absent. Starting the same configuration again
goes on from the newest that can be read; a configuration whose numbers would differ is refused.

Every checkpoint holds a fingerprint of its weights: orbax notices files that are missing or cut
short, but a byte that changed on the disk would be trained on.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import errno
import functools
import gc
import inspect
import json
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from eagle_jax import fingerprint
from eagle_jax.config import TrainConfig

# Fields that leave the computed function as it is: a run may go on with other values. Sharding,
# recomputation and the attention kernel change rounding at most. `data.workers` is not one of
# them: the saved data position is a different structure with it.
_FREE = {
    "output_dir",
    "data.cache_dir",
    "data.validation",
    "eval_every",
    "eval_batches",
    "checkpoint_every",
    "keep_checkpoints",
    "export_dtype",
    "fsdp",
    "tensor",
    "expert",
    "peak_flops",
    "attention",
    "remat",
    "stop_on_spike",
}
# Fields that configurations had in version 0.1, of which training knew the default only.
_LAYOUT_FIELDS = ("fused", "fused_qkv", "quantize")
_UNREADABLE = ".unreadable"  # ends the name of a checkpoint that was set aside


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted field -> JSON value; a nested dataclass also gives its type's name."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat[name] = type(value).__name__
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = list(value) if isinstance(value, tuple) else value
    return flat


def _defaults(config: Any, prefix: str = "") -> dict[str, Any]:
    """As `flatten`, of the fields that have a default, with that for a value."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        name, value = prefix + field.name, field.default
        if field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        if dataclasses.is_dataclass(value):
            flat[name] = type(value).__name__
        elif value is not dataclasses.MISSING:
            flat[name] = list(value) if isinstance(value, tuple) else value
        if dataclasses.is_dataclass(own := getattr(config, field.name)):
            flat |= _defaults(own, f"{name}.")
    return flat


def check_same(
    old: dict[str, Any],
    config: TrainConfig,
    directory: Path,
    contents: Mapping[str, str] | None = None,
) -> None:
    """Raise ValueError naming the first field that makes `config` another computation.

    `contents` has what counts of fields that name a place: what lies there.

    A field that the checkpoint lacks did not exist then, and the run had what is now its default.
    More steps are the same computation only while the learning rate does not depend on their
    number.
    """
    new, old = {**flatten(config), **(contents or {})}, {**_defaults(config), **old}
    free = _FREE | ({"optim.steps"} if config.optim.schedule == "constant" else set())
    free |= {name for name in old if name.rpartition(".")[2] in _LAYOUT_FIELDS}
    for name in [*new, *(name for name in old if name not in new)]:
        if name not in free and old.get(name) != new.get(name):
            raise ValueError(
                f"{name}={new.get(name)!r}: the run in {directory} has {old.get(name)!r}; go on "
                "with that value, choose another output_dir, or begin anew with --restart"
            )


def _pack(state: Any) -> Any:
    """Iterator state as JSON: grain's is a dictionary, or bytes."""
    if isinstance(state, bytes):
        return {"bytes": base64.b64encode(state).decode()}
    return {"json": json.loads(json.dumps(state))}


def _unpack(packed: Any) -> Any:
    return base64.b64decode(packed["bytes"]) if "bytes" in packed else packed["json"]


class _Unreadable(Exception):
    """A checkpoint is damaged; the message says how."""


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """Whatever orbax raises about damaged files, as `_Unreadable`."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError):  # says nothing about the files
        raise
    except Exception as error:
        raise _Unreadable(_reason(error)) from error


def _drop_loads() -> None:
    """Collect what a failed load had not begun, whose warnings would tell the user nothing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        gc.collect()


def _reason(error: BaseException) -> str:
    """The end of the innermost message; what comes before talks about handlers and drivers."""
    inner = error.__cause__ or error.__context__
    if inner:
        return _reason(inner)
    text = str(error) if " " in str(error) else repr(error)
    return ": ".join(text.splitlines()[0].split(" [")[0].split(": ")[-2:])


def _everywhere(ok: bool) -> bool:
    """Whether `ok` in every process; all have to ask."""
    if jax.process_count() == 1:
        return ok
    return bool(np.all(multihost_utils.process_allgather(np.asarray(ok))))


class Checkpoints:
    """The newest checkpoints of one run."""

    def __init__(
        self, directory: Path, config: TrainConfig, contents: Mapping[str, str] | None = None
    ) -> None:
        """Opens or creates `directory`; `contents` as in `check_same`."""
        policies = ocp.training.preservation_policies
        self._config, self._contents = config, contents or {}
        self._directory = directory
        self._pending: Any = None  # the save in progress
        _silence_orbax()
        self._checkpointer = ocp.training.Checkpointer(
            str(directory.resolve()),
            preservation_policy=policies.LatestN(config.keep_checkpoints),  # pyright: ignore
            cleanup_tmp_directories=True,  # what a killed run had half written
        )

    def save(self, step: int, state: Any, data_state: Any) -> None:
        """Begin to write; returns once `state` is copied and may be donated.

        Waits for the save before, if that is still in progress, and raises what it raised.
        """
        self.wait()
        metadata = {
            "config": flatten(self._config) | dict(self._contents),
            "data": _pack(data_state),
            "fingerprint": fingerprint.of_arrays(state),
        }
        self._pending = self._checkpointer.save_async(
            step, state, force=True, custom_metadata=metadata
        )

    def wait(self, seconds: float | None = None) -> None:
        """Wait for the save in progress, at most `seconds`.

        Raises:
            Exception: the save failed; the checkpoints before it are as they were.
        """
        if self._pending is None:
            return
        try:
            self._pending.result(timeout=seconds)
        except TimeoutError:
            if seconds is None:
                raise
            return
        self._pending = None

    def restore(self, abstract: Any) -> tuple[int, Any, Any] | None:
        """Step, state and data iterator's state of the newest checkpoint that can be read.

        Newer ones that cannot are set aside, with a line on stderr, so that training may write
        those steps again.

        Args:
            abstract: shapes, dtypes and shardings wanted, which need not be those saved.

        Returns:
            The three, or None if there are no checkpoints.

        Raises:
            ValueError: there are checkpoints, of which none can be read, or they are of a run that
                computed something else.
        """
        broken: dict[int, str] = {}
        for step in sorted((x.step for x in self._checkpointer.checkpoints), reverse=True):
            found, reason = None, "another process could not read it"
            try:
                found = self._read(step, abstract)
            except _Unreadable as error:
                reason = str(error)
            if found is None:
                _drop_loads()
            if not _everywhere(found is not None):
                broken[step] = reason
                continue
            self._set_aside(broken, step)
            return step, *found  # pyright: ignore
        if not broken:
            return None
        # Nothing is moved: the reason may be one for all, such as a disk that is not mounted.
        newest, reason = next(iter(broken.items()))
        raise ValueError(
            f"{self._directory}: no checkpoint of steps {sorted(broken)} can be read (step "
            f"{newest}: {reason}); put back a copy, or begin anew with --restart"
        )

    def close(self) -> None:
        """Wait for what is being written."""
        self.wait()
        self._checkpointer.close()

    def _read(self, step: int, abstract: Any) -> tuple[Any, Any]:
        with _reading():
            metadata: Any = self._checkpointer.metadata(step).custom_metadata or {}
            if not {"config", "data"} <= set(metadata):
                raise ValueError("its metadata are missing or cut short")
            if not isinstance(metadata["config"], dict):
                raise ValueError("its metadata hold no configuration")
            data_state = _unpack(metadata["data"])
        check_same(metadata["config"], self._config, self._directory.parent, self._contents)
        with _reading():
            state = jax.block_until_ready(self._checkpointer.load(step, abstract))
            if metadata.get("fingerprint") not in (None, fingerprint.of_arrays(state)):
                raise ValueError("its weights are not those that were saved")
        return state, data_state

    def _set_aside(self, broken: dict[int, str], good: int) -> None:
        for step, reason in broken.items():
            path = self._directory / str(step)
            aside = path.with_name(path.name + _UNREADABLE)
            if jax.process_index() == 0:
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
                print(
                    f"warning: {path}: cannot be read ({reason}); renamed to {aside.name}, "
                    f"going on from step {good}",
                    file=sys.stderr,
                )
        if broken:
            _everywhere(True)  # nobody looks before all are renamed
            self._checkpointer.reload()


@functools.cache
def _silence_orbax() -> None:
    """Damaged files and full disks are told in one line: orbax would log several tracebacks.

    Everything it logs is raised as well. EAGLE_JAX_DEBUG=1 leaves it as it is.
    """
    if os.environ.get("EAGLE_JAX_DEBUG") == "1":
        return

    def from_elsewhere(record: logging.LogRecord) -> bool:
        text = record.pathname + record.getMessage()
        return "orbax" not in text and "tensorstore" not in text

    for name in ("root", "absl", "asyncio"):
        logging.getLogger(name).addFilter(from_elsewhere)
    before = sys.unraisablehook

    def unraisable(what: Any) -> None:
        # Reads that are still under way when one fails come back to a loop that is gone, or are
        # collected where they wait.
        waits = inspect.iscoroutine(what.object) and "orbax" in what.object.cr_code.co_filename
        if not waits and str(what.exc_value) != "Event loop is closed":
            before(what)

    sys.unraisablehook = unraisable


@contextlib.contextmanager
def telling_full_disk(directory: Path, config: TrainConfig, size: int) -> Iterator[None]:
    """A disk without space, met by anything that writes a run, as one line.

    Args:
        directory: of the checkpoints.
        config: the run's.
        size: of a checkpoint, in bytes.

    Raises:
        ValueError: names the directory, the last checkpoint and what to do.
    """
    try:
        yield
    except Exception as error:
        if not _is_full_disk(error):
            raise
        steps = [int(x.name) for x in directory.glob("*") if x.name.isdecimal()]
        last = f"step {max(steps)} is saved" if steps else "no checkpoint is saved"
        keep = f"keep_checkpoints={config.keep_checkpoints}"
        raise ValueError(
            f"output_dir={config.output_dir!r}: disk full; {last}. A checkpoint takes "
            f"{size / 1e6:.1f} MB: free that much, lower {keep} (one more is written before the "
            "oldest goes) or move the directory, and start the same command again"
        ) from error


def _is_full_disk(error: BaseException | None) -> bool:
    if error is None:
        return False
    codes = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError) and error.errno in codes:
        return True
    # Tensorstore raises a ValueError with the system's text.
    if any(os.strerror(code) in str(error) for code in codes):
        return True
    return _is_full_disk(error.__cause__ or error.__context__)
