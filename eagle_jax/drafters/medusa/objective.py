"""Medusa-1's objective (arXiv 2401.10774 section 2.2.1): heads on the frozen target's features.

Head i at row t predicts token t + 2 + i.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from eagle_jax.checkpoint import hf
from eagle_jax.config import TrainConfig, TransformerConfig
from eagle_jax.drafters.medusa.config import MedusaTraining
from eagle_jax.drafters.medusa.module import MedusaHeads
from eagle_jax.models import bind, init_params
from eagle_jax.models.attention import AttentionKernel
from eagle_jax.train.objectives import target
from eagle_jax.train.objectives.base import (
    Batch,
    Sums,
    cross_entropy,
    head_kernel,
    matrices,
    means,
    next_weights,
    project,
    rank,
    shift,
    soft_labels,
    weighted_sums,
)
from eagle_jax.train.objectives.build import Vocabulary
from eagle_jax.train.objectives.checks import check_ahead, check_decay, check_same
from eagle_jax.types import Hidden, ParamDict


@dataclasses.dataclass(frozen=True, eq=False)
class MedusaObjective:
    """The cross-entropy of every head to the text or to the target's distribution.

    Metrics: `top1` and `top3` measure how often head 0 agrees with the label (the text's token, or
    the target's most likely one); `top1_h1`, ... measure the later heads.

    Attributes:
        settings: the heads, their loss weights, and the kind of labels.
        target_config, target: the frozen target.
        kernel: as in `TrainConfig` (`attention`).
    """

    settings: MedusaTraining
    target_config: TransformerConfig
    target: Mapping[str, Any] = dataclasses.field(repr=False)
    kernel: AttentionKernel = "xla"

    @property
    def vocab_size(self) -> int:
        return self.target_config.vocab_size

    def init(self, seed: int, frozen: Mapping[str, Any]) -> ParamDict:
        """Returns initial parameters: identity blocks, and copies of the target's head."""
        params = init_params(MedusaHeads, self.settings.draft, seed)
        if self.settings.draft.tie_lm_head:
            return params
        head = head_kernel(self.target_config, target.ends(frozen)).astype(jnp.float32)
        return {
            # Every head needs its own copy, since the optimizer's step donates its arrays.
            name: jnp.array(head) if name.endswith("lm_head.kernel") else value
            for name, value in params.items()
        }

    def frozen(self) -> Mapping[str, Any]:
        return self.target

    def loss(
        self, trainable: ParamDict, frozen: ParamDict, batch: Batch, key: jax.Array | None
    ) -> tuple[jax.Array, Sums]:
        """Returns the sum of the heads' losses, weighted by `decay`, and the metrics' sums.

        The number of rows that count differs between heads. The sums are those of head 0, and the
        means of other heads are scaled to its count.
        """
        del key
        frozen = jax.lax.stop_gradient(frozen)
        [features] = target.features(self.target_config, (), frozen, batch, self.kernel)
        shared = head_kernel(self.target_config, frozen)
        soft = soft_labels(features, shared) if self.settings.labels == "soft" else None

        def sums_of(i: int, hidden: Hidden, kernel: Float[Array, "d v"]) -> Sums:
            logits = project(hidden, kernel)
            if soft is None:
                best = shift(batch["tokens"], 2 + i)
                own = jnp.take_along_axis(logits, best[..., None], axis=-1)[..., 0]
                loss = jax.nn.logsumexp(logits, axis=-1) - own
            else:
                probs, best = (shift(x, 1 + i) for x in soft)
                loss = cross_entropy(logits, probs)
            place = rank(logits, best)
            rows = {"loss": loss, "top1": place < 1, "top3": place < 3}
            return weighted_sums(next_weights(batch, 2 + i), rows)

        heads = bind(MedusaHeads, self.settings.draft, trainable)
        # The logits of all heads would not fit in memory, so each head's are recomputed.
        sums_of = jax.checkpoint(sums_of, static_argnums=0)
        measured = []
        for i, hidden in enumerate(heads(features)):
            measured.append(sums_of(i, hidden, trainable.get(f"heads.{i}.lm_head.kernel", shared)))
        averages = [means(sums) for sums in measured]
        weighted = [self.settings.decay**i * values["loss"] for i, values in enumerate(averages)]
        total = jnp.sum(jnp.stack(weighted))
        first = measured[0]
        later = {f"top1_h{i}": values["top1"] for i, values in enumerate(averages) if i}
        return total, {
            "loss": first["count"] * total,
            "top1": first["top1"],
            "top3": first["top3"],
            "count": first["count"],
            **{name: first["count"] * value for name, value in later.items()},
        }

    def flops_per_token(self, sequence_length: int) -> float:
        draft = self.settings.draft
        shapes = jax.eval_shape(lambda: init_params(MedusaHeads, draft, 0))
        body, head = target.flops(self.settings, self.target_config, sequence_length)
        # The target, and its head for soft labels, run forward; the heads run forward and backward;
        # a shared frozen vocabulary head runs backward to its input only.
        labels = head if self.settings.labels == "soft" else 0.0
        shared = 2.0 * head * draft.num_heads if draft.tie_lm_head else 0.0
        return body + labels + 6.0 * matrices(shapes) + shared

    def export(
        self, directory: Path, params: Mapping[str, Any], dtype: str, tokenizer: Path
    ) -> None:
        del tokenizer  # it belongs to the target
        hf.save_draft(directory, self.settings.draft, params, dtype)


def build(
    config: TrainConfig,
    target_config: TransformerConfig,
    target_params: Mapping[str, Any],
    vocabulary: Vocabulary,
) -> MedusaObjective:
    """Returns the objective of a training run.

    Raises:
        ValueError: the draft does not fit the target or the text.
    """
    del vocabulary
    settings: MedusaTraining = config.objective  # pyright: ignore[reportAssignmentType]
    draft = settings.draft
    check_same("vocab_size", draft.vocab_size, target_config.vocab_size)
    check_same("hidden_size", draft.hidden_size, target_config.hidden_size)
    check_decay(settings.decay)
    check_ahead("objective.draft.num_heads", draft.num_heads, config)
    return MedusaObjective(settings, target_config, target_params, config.attention)
