"""Builds a run's objective from its configuration: reads the target, checks the draft's fit."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from eagle_jax.checkpoint import files, hf
from eagle_jax.config import DataConfig, NextToken, TrainConfig, TransformerConfig
from eagle_jax.drafters import registry
from eagle_jax.drafters.spec import resolve
from eagle_jax.text import Tokenizer
from eagle_jax.train import data
from eagle_jax.train.objectives.base import Objective
from eagle_jax.train.objectives.checks import check_head, check_length
from eagle_jax.train.objectives.next_token import NextTokenObjective
from eagle_jax.train.objectives.target import ENDS
from eagle_jax.vocabulary import draft_vocabulary

# Maps (draft architecture, text) to `d2t` and coverage of the draft vocabulary.
Vocabulary = Callable[[Any, DataConfig], tuple[np.ndarray, float | None]]

_PRETRAINED = Path(__file__).resolve().parents[2] / "pretrained"


def target_directory(name: str) -> Path:
    """Returns the directory of a target's weights.

    Args:
        name: directory of a target or of a pair of target and draft, or name of a shipped pair.

    Raises:
        ValueError: `name` is neither a directory with a target nor a shipped pair.
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


def build(config: TrainConfig) -> Objective:
    """Returns the objective of a run; for a draft, reads the weights of the frozen target.

    For a draft with a reduced vocabulary it also prepares the training text, if necessary, and
    chooses the vocabulary from it.

    Raises:
        ValueError: the target is missing, the draft does not fit it, or no drafter has this kind
            of objective.
    """
    settings = config.objective
    if isinstance(settings, NextToken):
        check_length("objective.model", settings.model, config)
        check_head("objective.model", settings.model)
        return NextTokenObjective(settings.model, config.attention, config.remat)
    registry.by_objective(settings)  # before the target is read
    target_config, weights = hf.open_target(target_directory(settings.target))
    if settings.features:
        weights = {name: x for name, x in weights.items() if name in ENDS}
    return assemble(config, target_config, files.in_memory(weights), _vocabulary)


def assemble(
    config: TrainConfig,
    target_config: TransformerConfig,
    target: Mapping[str, Any],
    vocabulary: Vocabulary,
) -> Objective:
    """Returns the objective of a draft, given its target.

    Args:
        config: the run's configuration.
        target_config, target: configuration and weights of the frozen target; shapes will do.
        vocabulary: (draft, data) -> `d2t` and coverage of a draft vocabulary.

    Raises:
        ValueError: the draft does not fit the target.
    """
    settings = config.objective
    assert not isinstance(settings, NextToken)
    spec = registry.by_objective(settings)
    check_head("objective.target", target_config)
    check_length("objective.target", target_config, config)
    return resolve(spec.build)(config, target_config, target, vocabulary)


def _vocabulary(draft: Any, text: DataConfig) -> tuple[np.ndarray, float | None]:
    """Returns the `draft_vocabulary` of the training text; it always has the EOS tokens."""
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
