"""Checks, before training starts, that a draft fits its target and its text.

Each check raises a `ValueError` of one line that names the field of the `TrainConfig`.
"""

from __future__ import annotations

from eagle_jax.config import TrainConfig, TransformerConfig


def check_same(name: str, draft: int, target: int) -> None:
    """Raises ValueError if a size of the draft differs from the target's."""
    if draft != target:
        raise ValueError(f"objective.draft.{name}={draft}: the target has {target}; set it to that")


def check_head(field: str, model: TransformerConfig) -> None:
    """Raises ValueError if the head has a soft cap: losses and labels do not compute it."""
    if model.final_logit_softcapping is not None:
        raise ValueError(
            f"{field}: has final_logit_softcapping={model.final_logit_softcapping}, which training "
            "does not compute; choose a target without it"
        )


def check_layers(layers: tuple[int, ...], last: int) -> None:
    """Raises ValueError if the draft reads a residual stream that the target does not have."""
    if max(layers) > last:
        raise ValueError(
            f"objective.draft.aux_layers={layers}: the target has {last} layers; "
            f"give numbers of 0 to {last}"
        )


def check_ahead(field: str, value: int, config: TrainConfig) -> None:
    """Raises ValueError if sequences are too short to predict `value` tokens ahead."""
    most = config.data.sequence_length - 2
    if not 1 <= value <= most:
        raise ValueError(
            f"{field}={value}: must be 1 to {most}, two less than data.sequence_length"
        )


def check_length(field: str, model: TransformerConfig, config: TrainConfig) -> None:
    """Raises ValueError if sequences are longer than the model's context."""
    longest = model.max_position_embeddings
    if config.data.sequence_length > longest:
        raise ValueError(
            f"data.sequence_length={config.data.sequence_length}: longer than {field}'s "
            f"max_position_embeddings={longest}; shorten it"
        )


def check_decay(decay: float) -> None:
    """Raises ValueError unless `decay` is positive; later steps or heads weigh its powers."""
    if not decay > 0:
        raise ValueError(f"objective.decay={decay}: must be above 0; 1 weighs all alike")
