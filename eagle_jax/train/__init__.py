"""Training of targets and drafts; `python -m eagle_jax.train --config CONFIG` runs it."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from eagle_jax import lazy
from eagle_jax.config import TrainConfig


def run(config: TrainConfig, *, restart: bool = False, dry_run: bool = False) -> dict[str, Any]:
    """Trains a target or a draft, or resumes its training; see `eagle_jax.train.loop.run`."""
    from eagle_jax.train import loop  # imported here to keep `import eagle_jax` light

    return loop.run(config, restart=restart, dry_run=dry_run)


__all__ = ["run"]


def __getattr__(name: str) -> ModuleType:
    return lazy.submodule(__name__, name)


def __dir__() -> list[str]:
    return lazy.names(__name__)
