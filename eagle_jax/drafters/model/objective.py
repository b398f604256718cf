"""Distillation: an independent small model learns the target's next-token distribution."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from eagle_jax.checkpoint import hf
from eagle_jax.config import TrainConfig, TransformerConfig
from eagle_jax.drafters.model.config import Distillation
from eagle_jax.models import Transformer, bind, init_params
from eagle_jax.models.attention import AttentionKernel
from eagle_jax.models.transformer import packed_mask
from eagle_jax.train.objectives import target
from eagle_jax.train.objectives.base import (
    Batch,
    Sums,
    cross_entropy,
    head_kernel,
    means,
    next_weights,
    project,
    rank,
    soft_labels,
    transformer_flops,
    weighted_sums,
)
from eagle_jax.train.objectives.build import Vocabulary
from eagle_jax.train.objectives.checks import check_length, check_same
from eagle_jax.types import Hidden, ParamDict


@dataclasses.dataclass(frozen=True, eq=False)
class DistillationObjective:
    """Soft cross-entropy at every row that predicts an assistant token.

    Metrics: `top1` and `top3` measure agreement with the target's most likely token.

    Attributes:
        settings: the small model's architecture.
        target_config, target: the frozen target.
        kernel, remat: as in `TrainConfig` (`attention`, `remat`).
    """

    settings: Distillation
    target_config: TransformerConfig
    target: Mapping[str, Any] = dataclasses.field(repr=False)
    kernel: AttentionKernel = "xla"
    remat: bool = False

    @property
    def vocab_size(self) -> int:
        return self.target_config.vocab_size

    def init(self, seed: int, frozen: Mapping[str, Any]) -> ParamDict:
        del frozen
        return init_params(Transformer, self.settings.draft, seed)

    def frozen(self) -> Mapping[str, Any]:
        return self.target

    def loss(
        self, trainable: ParamDict, frozen: ParamDict, batch: Batch, key: jax.Array | None
    ) -> tuple[jax.Array, Sums]:
        del key
        frozen = jax.lax.stop_gradient(frozen)
        [real] = target.features(self.target_config, (), frozen, batch, self.kernel)
        probs, best = soft_labels(real, head_kernel(self.target_config, frozen))
        draft = bind(Transformer, self.settings.draft, trainable)
        mask = packed_mask(batch["segment_ids"])
        features = draft(
            batch["tokens"], batch["positions"], mask, kernel=self.kernel, remat=self.remat
        ).features
        rows = jax.checkpoint(_rows) if self.remat else _rows
        values = rows(features, head_kernel(self.settings.draft, trainable), probs, best)
        sums = weighted_sums(next_weights(batch, 1), values)
        return means(sums)["loss"], sums

    def flops_per_token(self, sequence_length: int) -> float:
        frozen = sum(target.flops(self.settings, self.target_config, sequence_length))
        return frozen + 3.0 * sum(transformer_flops(self.settings.draft, sequence_length))

    def export(
        self, directory: Path, params: Mapping[str, Any], dtype: str, tokenizer: Path
    ) -> None:
        del tokenizer  # it belongs to the target
        hf.save_draft(directory, self.settings.draft, params, dtype)


def _rows(
    features: Hidden,
    kernel: Float[Array, "d v"],
    probs: Float[Array, "b t v"],
    best: Int[Array, "b t"],
) -> dict[str, Array]:
    logits = project(features, kernel)
    place = rank(logits, best)
    return {"loss": cross_entropy(logits, probs), "top1": place < 1, "top3": place < 3}


def build(
    config: TrainConfig,
    target_config: TransformerConfig,
    target_params: Mapping[str, Any],
    vocabulary: Vocabulary,
) -> DistillationObjective:
    """Returns the objective of a training run.

    Raises:
        ValueError: the draft does not fit the target or the text.
    """
    del vocabulary
    settings: Distillation = config.objective  # pyright: ignore[reportAssignmentType]
    check_same("vocab_size", settings.draft.vocab_size, target_config.vocab_size)
    check_length("objective.draft", settings.draft, config)
    return DistillationObjective(
        settings, target_config, target_params, config.attention, config.remat
    )
