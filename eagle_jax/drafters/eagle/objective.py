"""Feature regression (EAGLE-1, arXiv 2401.15077 section 4.2)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from eagle_jax.checkpoint import hf
from eagle_jax.config import TrainConfig, TransformerConfig
from eagle_jax.drafters.eagle.config import FeatureRegression
from eagle_jax.drafters.eagle.module import EagleDraft
from eagle_jax.models import bind, init_params
from eagle_jax.models.attention import AttentionKernel
from eagle_jax.models.transformer import packed_mask
from eagle_jax.train.objectives import target
from eagle_jax.train.objectives.base import (
    Batch,
    Sums,
    acceptance_loss,
    attention_flops,
    head_kernel,
    matrices,
    means,
    next_weights,
    project,
    rank,
    shift,
    weighted_sums,
)
from eagle_jax.train.objectives.build import Vocabulary
from eagle_jax.types import Hidden, ParamDict


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureRegressionObjective:
    """EAGLE-1's objective: smooth L1 to the target's features, and distillation through its head.

    Every step draws new uniform noise and adds it to the input features only.

    Attributes:
        settings: loss weights, noise, and the draft's architecture.
        target_config, target: the frozen target.
        kernel, remat: as in `TrainConfig` (`attention`, `remat`).
    """

    settings: FeatureRegression
    target_config: TransformerConfig
    target: Mapping[str, Any] = dataclasses.field(repr=False)
    kernel: AttentionKernel = "xla"
    remat: bool = False

    @property
    def vocab_size(self) -> int:
        return self.target_config.vocab_size

    def init(self, seed: int, frozen: Mapping[str, Any]) -> ParamDict:
        del frozen
        return init_params(EagleDraft, self.settings.draft, seed)

    def frozen(self) -> Mapping[str, Any]:
        return self.target

    def loss(
        self, trainable: ParamDict, frozen: ParamDict, batch: Batch, key: jax.Array | None
    ) -> tuple[jax.Array, Sums]:
        mask = packed_mask(batch["segment_ids"])
        frozen = jax.lax.stop_gradient(frozen)
        [features] = target.features(self.target_config, (), frozen, batch, self.kernel)
        embeddings = target.embedding(self.target_config, frozen)(shift(batch["tokens"], 1))
        read = features if key is None else features + self._noise(key, features)
        predicted = self._draft(trainable, embeddings, read, batch["positions"], mask)
        head = head_kernel(self.target_config, frozen)
        rows = functools.partial(_regression_rows, self.settings.loss)
        rows = jax.checkpoint(rows) if self.remat else rows
        sums = weighted_sums(next_weights(batch, 2), rows(predicted, shift(features, 1), head))
        feature_loss, token_loss = sums["feature_loss"], sums["token_loss"]
        sums["loss"] = (
            self.settings.feature_weight * feature_loss + self.settings.token_weight * token_loss
        )
        return means(sums)["loss"], sums

    def _noise(self, key: jax.Array, features: Hidden) -> Hidden:
        width = self.settings.noise
        noise = jax.random.uniform(key, features.shape, jnp.float32, -width, width)
        return noise.astype(features.dtype)

    def _draft(
        self,
        params: ParamDict,
        embeddings: Hidden,
        features: Hidden,
        positions: Int[Array, "b t"],
        mask: Bool[Array, "b t t"],
    ) -> Hidden:
        def forward(params: ParamDict) -> Hidden:
            draft = bind(EagleDraft, self.settings.draft, params)
            return draft(embeddings, features, positions, mask, kernel=self.kernel)[0]

        return (jax.checkpoint(forward) if self.remat else forward)(params)

    def flops_per_token(self, sequence_length: int) -> float:
        layer = self.settings.draft.layer()
        shapes = jax.eval_shape(lambda: init_params(EagleDraft, self.settings.draft, 0))
        draft = 2.0 * matrices(shapes) + attention_flops(layer, sequence_length)
        body, head = target.flops(self.settings, self.target_config, sequence_length)
        # The target and its head run forward; the draft forward and backward; the frozen head runs
        # again on the predicted features, forward and backward to its input.
        return body + head + 3.0 * draft + 2.0 * head

    def export(
        self, directory: Path, params: Mapping[str, Any], dtype: str, tokenizer: Path
    ) -> None:
        del tokenizer  # it belongs to the target
        hf.save_draft(directory, self.settings.draft, params, dtype)


def _regression_rows(
    loss: str, predicted: Hidden, real: Hidden, head: Float[Array, "d v"]
) -> dict[str, Float[Array, "b t"]]:
    """Returns both losses and the top-1 and top-3 agreement of every row; losses are float32."""
    error = jnp.abs(predicted.astype(jnp.float32) - real.astype(jnp.float32))
    smooth = jnp.where(error < 1.0, 0.5 * error * error, error - 0.5)
    target_logits, draft_logits = project(real, head), project(predicted, head)
    target_probs = jax.nn.softmax(target_logits, axis=-1)
    place = rank(draft_logits, jnp.argmax(target_logits, axis=-1).astype(jnp.int32))
    if loss == "lk":
        logs = jax.nn.log_softmax(target_logits, axis=-1)
        entropy = -jnp.sum(target_probs * logs, axis=-1)
        token_loss = acceptance_loss(draft_logits, target_probs, entropy)
    else:
        cross = jnp.sum(target_probs * draft_logits, axis=-1)
        token_loss = jax.nn.logsumexp(draft_logits, axis=-1) - cross
    return {
        "feature_loss": jnp.mean(smooth, axis=-1),
        "token_loss": token_loss,
        "top1": place < 1,
        "top3": place < 3,
    }


def build(
    config: TrainConfig,
    target_config: TransformerConfig,
    target_params: Mapping[str, Any],
    vocabulary: Vocabulary,
) -> FeatureRegressionObjective:
    """Returns the objective of a training run.

    Raises:
        ValueError: the draft does not fit the target or the text.
    """
    del vocabulary
    settings: FeatureRegression = config.objective  # pyright: ignore[reportAssignmentType]
    draft = settings.draft
    if draft.draft_vocab_size is not None:
        raise ValueError(
            f"objective.draft.draft_vocab_size={draft.draft_vocab_size}: EAGLE-1 is trained on the "
            "target's whole vocabulary; leave it out, and convert the trained head with "
            "--draft-vocabulary"
        )
    hf.check_fit(target_config, draft)
    return FeatureRegressionObjective(
        settings, target_config, target_params, config.attention, config.remat
    )
