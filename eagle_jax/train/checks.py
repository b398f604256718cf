"""Checks of a training run's configuration, before anything is read or compiled."""

from __future__ import annotations

from typing import Any

from eagle_jax import settings
from eagle_jax.checks import check_number, check_whole
from eagle_jax.config import OptimConfig, TrainConfig
from eagle_jax.outputs import check_directory

_SEEDS = 2**32 - 1
_STEPS = 2**31 - 1  # a step is an int32
_LARGEST = 3e38  # just below the largest float32


def check_config(config: TrainConfig) -> None:
    """Raises ValueError for the first field of `config` with a wrong type or range."""
    settings.check(config)
    check_directory("output_dir", config.output_dir)
    check_whole("seed", config.seed, 0, _SEEDS)
    check_whole("eval_every", config.eval_every, 0)
    for name in ("eval_batches", "checkpoint_every", "keep_checkpoints"):
        check_whole(name, getattr(config, name))
    for name in ("fsdp", "tensor", "expert"):
        check_whole(name, getattr(config, name))
    check_number("peak_flops", config.peak_flops, 0.0)
    if config.stop_on_spike and not 1 < config.stop_on_spike <= _LARGEST:
        raise ValueError(
            f"stop_on_spike={config.stop_on_spike}: must be above 1, or 0 for no check"
        )
    check_directory("data.cache_dir", config.data.cache_dir)
    check_whole("data.batch_size", config.data.batch_size)
    check_whole("data.sequence_length", config.data.sequence_length, 2)
    check_whole("data.workers", config.data.workers, 0)
    check_whole("data.seed", config.data.seed, 0, _SEEDS)
    check_optimizer("optim", config.optim)
    _check_objective(config.objective)


def check_optimizer(field: str, optim: OptimConfig) -> None:
    """Raises ValueError for the first field of `optim` that is out of range."""
    check_whole(f"{field}.steps", optim.steps, 1, _STEPS)
    check_whole(f"{field}.warmup_steps", optim.warmup_steps, 0, _STEPS)
    check_number(f"{field}.learning_rate", optim.learning_rate, 0.0, _LARGEST, above=True)
    for name in ("final_fraction", "weight_decay"):
        check_number(f"{field}.{name}", getattr(optim, name), 0.0, _LARGEST)
    for name in ("b1", "b2"):
        value = getattr(optim, name)
        if not 0 <= value < 1:
            raise ValueError(f"{field}.{name}={value}: must be a number from 0 and below 1")
    check_number(f"{field}.eps", optim.eps, 0.0, _LARGEST, above=True)
    for name in ("clip_value", "clip_norm"):
        value = getattr(optim, name)
        if value is not None and not 0 < value <= _LARGEST:
            raise ValueError(f"{field}.{name}={value}: must be a number above 0, or None")


def _check_objective(objective: Any) -> None:
    """Checks the loss weights; fields that depend on the target are checked in `objectives`."""
    for name in ("feature_weight", "token_weight", "noise"):
        if hasattr(objective, name):
            check_number(f"objective.{name}", getattr(objective, name), 0.0, _LARGEST)
    if hasattr(objective, "decay") and not 0 < objective.decay <= _LARGEST:
        raise ValueError(f"objective.decay={objective.decay}: must be above 0; 1 weighs all alike")
