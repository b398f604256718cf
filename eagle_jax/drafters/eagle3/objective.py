"""Training-time test (EAGLE-3, arXiv 2503.01840 section 3.1): a draft learns on its own states.

Each row drafts its own chain along the tokens of the text. At step j, row t reads token t + 1 + j
and the state of row t after step j - 1 (at step 0 the fused features of the target), at rotary
position t + j. It predicts token t + 2 + j; its label is the target's distribution at row
t + 1 + j. `ttt_attention.py` implements the attention.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from eagle_jax.checkpoint import hf
from eagle_jax.config import TrainConfig, TransformerConfig
from eagle_jax.drafters.eagle3 import ttt_attention
from eagle_jax.drafters.eagle3.config import TrainingTimeTest
from eagle_jax.drafters.eagle3.module import Eagle3Draft
from eagle_jax.models import bind, init_params
from eagle_jax.models.attention import AttentionKernel
from eagle_jax.train.objectives import target
from eagle_jax.train.objectives.base import (
    Batch,
    Sums,
    acceptance_loss,
    attention_flops,
    cross_entropy,
    head_kernel,
    matrices,
    next_weights,
    project,
    rank,
    shift,
)
from eagle_jax.train.objectives.build import Vocabulary
from eagle_jax.train.objectives.checks import (
    check_ahead,
    check_decay,
    check_layers,
    check_same,
)
from eagle_jax.types import Hidden, KeyValue, ParamDict


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Labels:
    """The labels of every row: the target's distribution over the draft vocabulary.

    Attributes:
        probs: the distribution, renormalised over the draft vocabulary.
        mass: total probability of the draft vocabulary before renormalisation.
        entropy: entropy of `probs`.
        best: draft id of the target's most likely token, or `OUTSIDE`.
    """

    probs: Float[Array, "b t v"]
    mass: Float[Array, "b t"]
    entropy: Float[Array, "b t"]
    best: Int[Array, "b t"]

    def ahead(self, by: int) -> Labels:
        """Returns the labels shifted so that each row has those of the row `by` places later."""
        return jax.tree.map(lambda x: shift(x, by), self)


OUTSIDE = -1


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingTimeTestObjective:
    """EAGLE-3's objective: distillation over several draft steps.

    Metrics: `top1` and `top3` measure how often step 0 agrees with the target's most likely token,
    and `top1_last` measures the last step. A token outside the draft vocabulary is a miss.

    Attributes:
        settings: steps, weights, loss, and the draft's architecture.
        target_config, target: the frozen target.
        d2t: int32 [draft vocabulary]; see `eagle_jax.vocabulary`.
        coverage: share of the training text inside the draft vocabulary.
        kernel: attention kernel of the target's pass; `ttt_attention.causal` explains why the
            draft cannot use it.
        remat: as in `TrainConfig`. It also recomputes the draft's products and the logits of all
            steps (float32, steps x tokens x draft vocabulary), which are otherwise stored.
        chunk: number of queries whose attention scores are in memory at once.
    """

    settings: TrainingTimeTest
    target_config: TransformerConfig
    target: Mapping[str, Any] = dataclasses.field(repr=False)
    d2t: np.ndarray = dataclasses.field(repr=False)
    coverage: float | None = None
    kernel: AttentionKernel = "xla"
    remat: bool = False
    chunk: int = ttt_attention.CHUNK

    @property
    def vocab_size(self) -> int:
        return self.target_config.vocab_size

    def _tokens(self) -> np.ndarray:
        """Returns the target's token of every entry of the draft vocabulary."""
        return np.arange(len(self.d2t)) + self.d2t

    def init(self, seed: int, frozen: Mapping[str, Any]) -> ParamDict:
        """Returns initial parameters: norm and head from the target, the others random."""
        tokens = self._tokens()
        ends = target.ends(frozen)
        scale = ends["norm.scale"].astype(jnp.float32)
        if self.target_config.unit_offset_norm:
            scale = scale + 1.0
        head = head_kernel(self.target_config, ends)
        return {
            **init_params(Eagle3Draft, self.settings.draft, seed),
            "norm.scale": scale,
            "lm_head.kernel": head[:, tokens].astype(jnp.float32),
        }

    def frozen(self) -> Mapping[str, Any]:
        return self.target

    def loss(
        self, trainable: ParamDict, frozen: ParamDict, batch: Batch, key: jax.Array | None
    ) -> tuple[jax.Array, Sums]:
        """Returns the sum of the steps' losses, weighted by `decay`, and the metrics' sums.

        The number of rows that count differs between steps. The sums are those of step 0, and the
        means of other steps are scaled to its count.
        """
        del key
        frozen = jax.lax.stop_gradient(frozen)
        layers = self.settings.draft.aux_layers
        *streams, last = target.features(self.target_config, layers, frozen, batch, self.kernel)
        labels = self._labels(last, head_kernel(self.target_config, frozen))
        state = self._draft(trainable).fuse(jnp.concatenate(streams, axis=-1))
        # The attention scores of all steps would not fit in memory, so they are recomputed. For the
        # backward pass each step stores its inputs and its attention's result and, without
        # `remat`, the results of matrix products.
        keep = jax.checkpoint_policies.save_only_these_names(ttt_attention.SAVED)
        if not self.remat:
            products = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            keep = jax.checkpoint_policies.save_from_both_policies(keep, products)
        total, pairs, measured = jnp.zeros(()), (), []
        for j in range(self.settings.steps):
            step = jax.checkpoint(functools.partial(self._step, j), policy=keep)
            left, pair = step(trainable, frozen, state, pairs, batch)
            measure = functools.partial(self._measure, j)
            measure = jax.checkpoint(measure) if self.remat else measure
            sums = measure(trainable, left, labels, batch)
            state = self._draft(trainable).feed_back(left)
            pairs = (*pairs, pair)
            measured.append(sums)
            total += self.settings.decay**j * self._mean(sums, batch)
        first, last = measured[0], measured[-1]
        count = first["count"]
        return total, {
            "loss": count * total,
            "top1": first["top1"],
            "top3": first["top3"],
            "top1_last": count * last["top1"] / jnp.maximum(last["count"], 1.0),
            "count": count,
        }

    def _draft(self, params: ParamDict) -> Eagle3Draft:
        return bind(Eagle3Draft, self.settings.draft, {**params, "d2t": jnp.asarray(self.d2t)})

    def _labels(self, features: Hidden, head: Float[Array, "d v"]) -> Labels:
        tokens = self._tokens()
        entry = np.full(self.vocab_size, OUTSIDE, np.int32)
        entry[tokens] = np.arange(len(tokens))
        logits = project(features, head)
        all_of_them = np.array_equal(tokens, np.arange(self.vocab_size))
        inside = logits if all_of_them else project(features, head[:, tokens])
        log_probs = jax.nn.log_softmax(inside, axis=-1)
        probs = jnp.exp(log_probs)
        return Labels(
            probs=probs.astype(features.dtype),  # as in `soft_labels`
            mass=jnp.exp(jax.nn.logsumexp(inside, axis=-1) - jax.nn.logsumexp(logits, axis=-1)),
            entropy=-jnp.sum(probs * log_probs, axis=-1),
            best=jnp.asarray(entry)[jnp.argmax(logits, axis=-1)],
        )

    def _step(
        self,
        j: int,
        params: ParamDict,
        frozen: ParamDict,
        state: Hidden,
        pairs: tuple[KeyValue, ...],
        batch: Batch,
    ) -> tuple[Hidden, KeyValue]:
        """Returns the layer's output for the states, and this step's keys and values."""
        draft = self._draft(params)
        layer = draft.midlayer
        embed = draft.embed_tokens or target.embedding(self.target_config, frozen)
        embeddings = embed(shift(batch["tokens"], j + 1))
        query, keys, values = layer.self_attn.project(
            layer.read(embeddings, state), batch["positions"] + j
        )
        pair = (keys.transpose(0, 2, 1, 3), values.transpose(0, 2, 1, 3))
        real, *own = *pairs, pair
        mixed = ttt_attention.attend(query, real, own, batch["segment_ids"], self.chunk)
        mixed = layer.self_attn.o_proj(mixed.reshape(*state.shape[:2], -1))
        return layer.leave(state, mixed), pair

    def _measure(
        self, j: int, params: ParamDict, left: Hidden, labels: Labels, batch: Batch
    ) -> Sums:
        """Returns sums over rows: "count" of marked rows, "rows" of those with a label, metrics."""
        labels, marked = labels.ahead(j + 1), next_weights(batch, j + 2)
        # The same as `Eagle3Draft.logits`, with the cheaper gradient of `project`.
        logits = project(self._draft(params).norm(left), params["lm_head.kernel"])
        weights = jnp.where(labels.best == OUTSIDE, 0.0, marked)
        place = rank(logits, jnp.maximum(labels.best, 0))
        if self.settings.loss == "lk":
            rows = acceptance_loss(logits, labels.probs, labels.entropy, labels.mass)
        else:
            rows = cross_entropy(logits, labels.probs)
        return {
            "loss": jnp.sum(weights * rows),
            "rows": jnp.sum(weights),
            "top1": jnp.sum(jnp.where(place < 1, weights, 0.0)),
            "top3": jnp.sum(jnp.where(place < 3, weights, 0.0)),
            "count": jnp.sum(marked),
        }

    def _mean(self, sums: Sums, batch: Batch) -> Float[Array, ""]:
        if self.settings.mean == "all":
            return sums["loss"] / batch["tokens"].size
        return sums["loss"] / jnp.maximum(sums["rows"], 1.0)

    def flops_per_token(self, sequence_length: int) -> float:
        settings, draft = self.settings, self.settings.draft
        shapes = jax.eval_shape(lambda: init_params(Eagle3Draft, draft, 0))
        fuse = float(2 * shapes["fc.kernel"].size)
        attention = attention_flops(draft.layer(), sequence_length)
        step = 2.0 * matrices(shapes) - fuse + attention
        # For every earlier drafted step: one product with the row's own key, one with its value.
        pairs = settings.steps * (settings.steps - 1) / 2
        own = 4.0 * draft.num_attention_heads * draft.head_dim * pairs
        # The target and its head run forward; the draft's steps run forward and backward.
        frozen = sum(target.flops(self.settings, self.target_config, sequence_length))
        return frozen + 3.0 * (fuse + settings.steps * step + own)

    def export(
        self, directory: Path, params: Mapping[str, Any], dtype: str, tokenizer: Path
    ) -> None:
        del tokenizer  # it belongs to the target
        params = {**params, "d2t": np.asarray(self.d2t)}
        hf.save_draft(directory, self.settings.draft, params, dtype, coverage=self.coverage)


def build(
    config: TrainConfig,
    target_config: TransformerConfig,
    target_params: Mapping[str, Any],
    vocabulary: Vocabulary,
) -> TrainingTimeTestObjective:
    """Returns the objective of a training run.

    Raises:
        ValueError: the draft does not fit the target or the text.
    """
    settings: TrainingTimeTest = config.objective  # pyright: ignore[reportAssignmentType]
    draft = settings.draft
    check_same("vocab_size", draft.vocab_size, target_config.vocab_size)
    check_same("hidden_size", draft.feature_size, target_config.hidden_size)
    check_decay(settings.decay)
    check_ahead("objective.steps", settings.steps, config)
    check_layers(draft.aux_layers, target_config.num_hidden_layers)
    d2t, coverage = vocabulary(draft, config.data)
    return TrainingTimeTestObjective(
        settings, target_config, target_params, d2t, coverage, config.attention, config.remat
    )
