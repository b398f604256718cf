"""From a run's configuration to its objective: reads the target, checks that the draft fits."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from eagle_jax import config as configs
from eagle_jax.checkpoint import files, hf
from eagle_jax.text import Tokenizer
from eagle_jax.train import data
from eagle_jax.train.objectives.base import Objective
from eagle_jax.train.objectives.distillation import DistillationObjective
from eagle_jax.train.objectives.eagle1 import FeatureRegressionObjective
from eagle_jax.train.objectives.eagle3 import TrainingTimeTestObjective
from eagle_jax.train.objectives.medusa import MedusaObjective
from eagle_jax.train.objectives.next_token import NextTokenObjective
from eagle_jax.train.objectives.target import ENDS
from eagle_jax.vocabulary import draft_vocabulary

_PRETRAINED = Path(__file__).resolve().parents[2] / "pretrained"


def target_directory(name: str) -> Path:
    """Where the weights of a target lie: a directory (a pair's, or a target's own), or a name.

    Raises:
        ValueError: neither a directory nor a shipped pair.
    """
    for base in (Path(name).expanduser(), _PRETRAINED / name):
        for directory in (base / "target", base):
            if (directory / "config.json").is_file():
                return directory
    shipped = sorted(path.parts[-3] for path in _PRETRAINED.glob("*/target/config.json"))
    raise ValueError(
        f"objective.target={name!r}: no config.json there; give a directory that holds a target, "
        f"or a shipped pair: {', '.join(shipped) or 'none'}"
    )


def build(config: configs.TrainConfig) -> Objective:
    """The objective of a run; reads what it needs of the frozen target, if there is one.

    EAGLE-3 prepares the training text, if that was not done before, to choose the draft vocabulary.

    Raises:
        ValueError: the target is missing, or the draft does not fit it.
    """
    settings = config.objective
    if isinstance(settings, configs.NextToken):
        _check_length("objective.model", settings.model, config)
        _check_head("objective.model", settings.model)
        return NextTokenObjective(settings.model, config.attention, config.remat)
    target_config, weights = hf.open_target(target_directory(settings.target))
    if settings.features:
        weights = {name: x for name, x in weights.items() if name in ENDS}
    return assemble(config, target_config, files.in_memory(weights), _vocabulary)


def assemble(
    config: configs.TrainConfig,
    target_config: configs.TransformerConfig,
    target: Mapping[str, Any],
    vocabulary: Callable[..., tuple[np.ndarray, float | None]],
) -> Objective:
    """The objective of a draft, given its target.

    Args:
        config: the run's.
        target_config, target: the frozen target; arrays, or their shapes.
        vocabulary: (draft, data) -> `d2t` and coverage of an EAGLE-3 draft.

    Raises:
        ValueError: the draft does not fit the target.
    """
    settings = config.objective
    assert not isinstance(settings, configs.NextToken)
    _check_head("objective.target", target_config)
    if isinstance(settings, configs.FeatureRegression):
        _check_whole(settings.draft)
        hf.check_fit(target_config, settings.draft)
        _check_length("objective.target", target_config, config)
        return FeatureRegressionObjective(
            settings, target_config, target, config.attention, config.remat
        )
    _check_length("objective.target", target_config, config)
    _check_same("vocab_size", settings.draft.vocab_size, target_config.vocab_size)
    if isinstance(settings, configs.Distillation):
        _check_length("objective.draft", settings.draft, config)
        return DistillationObjective(
            settings, target_config, target, config.attention, config.remat
        )
    own = settings.draft.hidden_size
    if isinstance(settings.draft, configs.Eagle3Config):
        own = settings.draft.feature_size
    _check_same("hidden_size", own, target_config.hidden_size)
    if not settings.decay > 0:
        raise ValueError(f"objective.decay={settings.decay}: must be above 0; 1 weighs all alike")
    if isinstance(settings, configs.MedusaTraining):
        _check_ahead("objective.draft.num_heads", settings.draft.num_heads, config)
        return MedusaObjective(settings, target_config, target, config.attention)
    _check_ahead("objective.steps", settings.steps, config)
    _check_layers(settings.draft.aux_layers, target_config.num_hidden_layers)
    d2t, coverage = vocabulary(settings.draft, config.data)
    return TrainingTimeTestObjective(
        settings, target_config, target, d2t, coverage, config.attention, config.remat
    )


def _vocabulary(
    draft: configs.Eagle3Config, text: configs.DataConfig
) -> tuple[np.ndarray, float | None]:
    """`draft_vocabulary` of the training text; the end of an answer is always in it."""
    counts = data.token_counts(text)
    if len(counts) > draft.vocab_size:
        raise ValueError(
            f"data.tokenizer={text.tokenizer!r}: gave token {len(counts) - 1}, but the model has "
            f"vocab_size={draft.vocab_size}; use the model's own tokenizer"
        )
    counts = np.pad(counts, (0, draft.vocab_size - len(counts)))
    ends = Tokenizer.load(text.tokenizer).eos_ids
    field = "objective.draft.draft_vocab_size"
    d2t, coverage = draft_vocabulary(counts, draft.draft_vocab_size, ends, field)
    if jax.process_index() == 0:
        print(
            f"draft vocabulary: {draft.draft_vocab_size} of {draft.vocab_size} tokens cover "
            f"{coverage:.2%} of the training text",
            file=sys.stderr,
            flush=True,
        )
    return d2t, coverage


def _check_same(name: str, draft: int, target: int) -> None:
    if draft != target:
        raise ValueError(f"objective.draft.{name}={draft}: the target has {target}; set it to that")


def _check_whole(draft: configs.EagleConfig) -> None:
    if draft.draft_vocab_size is not None:
        raise ValueError(
            f"objective.draft.draft_vocab_size={draft.draft_vocab_size}: EAGLE-1 is trained on the "
            "target's whole vocabulary; leave it out, and convert the trained head with "
            "--draft-vocabulary"
        )


def _check_head(field: str, model: configs.TransformerConfig) -> None:
    """Losses and labels are plain products of features and vocabulary matrix."""
    if model.final_logit_softcapping is not None:
        raise ValueError(
            f"{field}: has final_logit_softcapping={model.final_logit_softcapping}, which training "
            "does not compute; choose a target without it"
        )


def _check_layers(layers: tuple[int, ...], last: int) -> None:
    if max(layers) > last:
        raise ValueError(
            f"objective.draft.aux_layers={layers}: the target has {last} layers; "
            f"give numbers of 0 to {last}"
        )


def _check_ahead(field: str, value: int, config: configs.TrainConfig) -> None:
    most = config.data.sequence_length - 2
    if not 1 <= value <= most:
        raise ValueError(
            f"{field}={value}: must be 1 to {most}, two less than data.sequence_length"
        )


def _check_length(
    field: str, model: configs.TransformerConfig, config: configs.TrainConfig
) -> None:
    longest = model.max_position_embeddings
    if config.data.sequence_length > longest:
        raise ValueError(
            f"data.sequence_length={config.data.sequence_length}: longer than {field}'s "
            f"max_position_embeddings={longest}; shorten it"
        )
