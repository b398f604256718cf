"""Checkpoints of a training run: weights, optimizer state, step, data position, configuration.

Orbax writes them asynchronously, so that each is either complete or absent. A run that is started
again resumes from the newest readable checkpoint; a configuration that would compute something else
is refused.

Every checkpoint contains a fingerprint of its weights: orbax detects missing and truncated files,
but not a byte that changed on the disk.
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

# Fields that may change when a run resumes, since they do not change the computed function.
# Sharding, recomputation and the attention kernel change rounding at most. `data.workers` is not
# listed because the saved data position depends on it.
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
# Fields that configurations had in version 0.1; training supported only their defaults.
_LAYOUT_FIELDS = ("fused", "fused_qkv", "quantize")
_UNREADABLE = ".unreadable"  # suffix of a checkpoint that was set aside


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Returns the JSON value of each dotted field, and the type name of each nested dataclass."""
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
    """Returns the defaults of the fields that have one, by dotted field, as `flatten` does."""
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
    """Raises ValueError for the first field that makes `config` a different computation.

    `contents` gives, for fields that name files, a fingerprint of the files, which is compared
    instead of the path.

    If the checkpoint lacks a field, the field is newer than the run, which behaved as the default
    does now. The number of steps may change only if the learning rate does not depend on it.
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
    """Returns the state of a data iterator (grain's: a dictionary or bytes) as a JSON value."""
    if isinstance(state, bytes):
        return {"bytes": base64.b64encode(state).decode()}
    return {"json": json.loads(json.dumps(state))}


def _unpack(packed: Any) -> Any:
    return base64.b64decode(packed["bytes"]) if "bytes" in packed else packed["json"]


class _Unreadable(Exception):
    """The error of a damaged checkpoint; the message tells what is damaged."""


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """Turns the errors that orbax raises for damaged files into `_Unreadable`."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError):  # not caused by the files
        raise
    except Exception as error:
        raise _Unreadable(_reason(error)) from error


def _drop_loads() -> None:
    """Collects the unstarted coroutines of a failed load, without their warnings."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        gc.collect()


def _reason(error: BaseException) -> str:
    """Returns the end of the innermost error's message; the rest names handlers and drivers."""
    inner = error.__cause__ or error.__context__
    if inner:
        return _reason(inner)
    text = str(error) if " " in str(error) else repr(error)
    return ": ".join(text.splitlines()[0].split(" [")[0].split(": ")[-2:])


def _everywhere(ok: bool) -> bool:
    """Returns whether `ok` is true in all processes; every process must call it."""
    if jax.process_count() == 1:
        return ok
    return bool(np.all(multihost_utils.process_allgather(np.asarray(ok))))


class Checkpoints:
    """Writes and reads the checkpoints of one run."""

    def __init__(
        self, directory: Path, config: TrainConfig, contents: Mapping[str, str] | None = None
    ) -> None:
        """Opens or creates `directory`; `contents` is that of `check_same`."""
        policies = ocp.training.preservation_policies
        self._config, self._contents = config, contents or {}
        self._directory = directory
        self._pending: Any = None  # the save in progress
        _silence_orbax()
        self._checkpointer = ocp.training.Checkpointer(
            str(directory.resolve()),
            preservation_policy=policies.LatestN(config.keep_checkpoints),  # pyright: ignore
            cleanup_tmp_directories=True,  # half-written checkpoints of a killed run
        )

    def save(self, step: int, state: Any, data_state: Any) -> None:
        """Starts to write a checkpoint; returns once `state` is copied and may be donated.

        Waits for the previous save if it is still in progress, and raises the error it raised.
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
        """Waits for the save in progress, at most `seconds`.

        Raises:
            Exception: the save failed; earlier checkpoints are unchanged.
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
        """Returns step, state and data iterator's state of the newest readable checkpoint.

        Newer checkpoints that cannot be read are renamed, with a line on stderr, so that training
        can write those steps again.

        Args:
            abstract: shapes, dtypes and shardings of the result; the saved shardings may differ.

        Returns:
            Step, state and data iterator's state, or None if there are no checkpoints.

        Raises:
            ValueError: there are checkpoints, but none can be read, or they belong to a different
                computation.
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
        # Nothing is renamed: all may have the same cause, such as a disk that is not mounted.
        newest, reason = next(iter(broken.items()))
        raise ValueError(
            f"{self._directory}: no checkpoint of steps {sorted(broken)} can be read (step "
            f"{newest}: {reason}); put back a copy, or begin anew with --restart"
        )

    def close(self) -> None:
        """Waits for the save in progress and closes the checkpointer."""
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
            _everywhere(True)  # all processes wait until the renames are done
            self._checkpointer.reload()


@functools.cache
def _silence_orbax() -> None:
    """Silences orbax, which logs several tracebacks for a damaged file or a full disk.

    Orbax also raises everything that it logs. With EAGLE_JAX_DEBUG=1 nothing is silenced.
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
        # When one read fails, the others still return to an event loop that is closed, or are
        # garbage-collected while they wait.
        waits = inspect.iscoroutine(what.object) and "orbax" in what.object.cr_code.co_filename
        if not waits and str(what.exc_value) != "Event loop is closed":
            before(what)

    sys.unraisablehook = unraisable


@contextlib.contextmanager
def telling_full_disk(directory: Path, config: TrainConfig, size: int) -> Iterator[None]:
    """Turns the error of a full disk, raised by any write of a run, into a ValueError of one line.

    Args:
        directory: directory of the checkpoints.
        config: the run's configuration.
        size: size of a checkpoint in bytes.

    Raises:
        ValueError: the disk is full; the message names the directory, the last checkpoint and a
            remedy.
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
    # Tensorstore raises a ValueError with the operating system's message.
    if any(os.strerror(code) in str(error) for code in codes):
        return True
    return _is_full_disk(error.__cause__ or error.__context__)
