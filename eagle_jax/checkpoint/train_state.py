"""Checkpoints of a training run: weights, optimizer state, step, data position, configuration.

Written asynchronously by orbax, each complete or absent. Starting the same configuration again
goes on from the newest; a configuration whose numbers would differ is refused.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

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
    "peak_flops",
    "attention",
    "remat",
}


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


def check_same(old: dict[str, Any], config: TrainConfig, directory: Path) -> None:
    """Raise ValueError naming the first field that makes `config` another computation.

    A field that the checkpoint lacks did not exist then, and the run had what is now its default.
    More steps are the same computation only while the learning rate does not depend on their
    number.
    """
    new, old = flatten(config), {**_defaults(config), **old}
    free = _FREE | ({"optim.steps"} if config.optim.schedule == "constant" else set())
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


class Checkpoints:
    """The newest checkpoints of one run."""

    def __init__(self, directory: Path, config: TrainConfig) -> None:
        """Opens or creates `directory`.

        Raises:
            ValueError: it holds checkpoints of a run that computed something else.
        """
        policies = ocp.training.preservation_policies
        self._config = config
        self._checkpointer = ocp.training.Checkpointer(
            str(directory.resolve()),
            preservation_policy=policies.LatestN(config.keep_checkpoints),  # pyright: ignore
            cleanup_tmp_directories=True,  # what a killed run had half written
        )
        if self.latest:
            check_same(self._metadata()["config"], config, directory.parent)

    @property
    def latest(self) -> int:
        """Step of the newest complete checkpoint, 0 if there is none."""
        latest = self._checkpointer.latest
        return 0 if latest is None else latest.step

    def _metadata(self) -> dict[str, Any]:
        metadata = self._checkpointer.metadata(self.latest).custom_metadata
        assert isinstance(metadata, dict)
        return metadata

    def save(self, step: int, state: Any, data_state: Any) -> None:
        """Begin to write; returns once `state` is copied and may be donated."""
        metadata = {"config": flatten(self._config), "data": _pack(data_state)}
        self._checkpointer.save_async(step, state, force=True, custom_metadata=metadata)

    def restore(self, abstract: Any) -> tuple[Any, Any]:
        """State of the newest checkpoint, and the data iterator's.

        Args:
            abstract: shapes, dtypes and shardings wanted, which need not be those saved.
        """
        state = self._checkpointer.load(self.latest, abstract)
        return jax.block_until_ready(state), _unpack(self._metadata()["data"])

    def close(self) -> None:
        """Wait for what is being written."""
        self._checkpointer.close()
