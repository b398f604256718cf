"""What is trained, and against what: a loss as a function of parameters.

Two objectives behind one interface, `Objective`: next-token cross-entropy trains a target,
feature regression (EAGLE-1, arXiv 2401.15077 section 4.2) trains a draft. Both work on packed
sequences: `loss_mask` marks assistant tokens, and a row counts if the token whose distribution it
predicts is marked.

| | row i reads | predicts | weight |
|---|---|---|---|
| next token | t_i | t_{i+1} | mask[i+1] |
| features | f_i, embedding of t_{i+1} | f_{i+1}, so t_{i+2}'s distribution | mask[i+2] |
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from eagle_jax import config as configs
from eagle_jax.checkpoint import hf
from eagle_jax.models import EagleDraft, Transformer, bind, init_params
from eagle_jax.models.layers import AttentionKernel
from eagle_jax.models.transformer import packed_mask
from eagle_jax.text import Tokenizer
from eagle_jax.types import Hidden, Logits, ParamDict

# Names as in `eagle_jax.train.data`: tokens, positions, segment_ids, loss_mask; each [b, t].
Batch = Mapping[str, jax.Array]
# Sums over the weighted rows of a batch; "count" is the sum of weights.
Sums = dict[str, jax.Array]

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)
_PRETRAINED = Path(__file__).resolve().parent.parent / "pretrained"


@runtime_checkable
class Objective(Protocol):
    """What the loop needs of an objective. Arithmetic runs in the dtype of the parameters."""

    @property
    def vocab_size(self) -> int:
        """Tokens must be below it."""
        ...

    def init(self, seed: int) -> ParamDict:
        """Random float32 parameters to train."""
        ...

    def frozen(self) -> Mapping[str, Any]:
        """Parameters that are read and not trained; passed to `loss`, never closed over."""
        ...

    def loss(
        self, trainable: ParamDict, frozen: ParamDict, batch: Batch, key: jax.Array | None
    ) -> tuple[jax.Array, Sums]:
        """Masked mean over the batch, and the sums and count that it and the metrics come from.

        Without `key` nothing is random: validation.
        """
        ...

    def flops_per_token(self, sequence_length: int) -> float:
        """Model FLOPs of one training step per token; see `transformer_flops`."""
        ...

    def export(
        self, directory: Path, params: Mapping[str, Any], dtype: str, tokenizer: Path
    ) -> None:
        """Write the trained weights in the public format; a target takes its tokenizer along."""
        ...


def shift(x: Array, by: int) -> Array:
    """`x[:, i + by]` at row i, zeros past the end."""
    return jnp.pad(x[:, by:], [(0, 0), (0, by)] + [(0, 0)] * (x.ndim - 2))


def next_weights(batch: Batch, ahead: int) -> Float[Array, "b t"]:
    """Weights of rows that predict the token `ahead` places on: its mask, within the segment."""
    segments = batch["segment_ids"]
    together = segments > 0
    for by in range(1, ahead + 1):
        together &= segments == shift(segments, by)
    return jnp.where(together, shift(batch["loss_mask"], ahead), 0.0)


def rank(logits: Logits, tokens: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """Place of `tokens` in descending `logits`, 0 the first; equals rank by index.

    A count over the vocabulary: several times cheaper than `lax.top_k` of every row.
    """
    own = jnp.take_along_axis(logits, tokens[..., None], axis=-1)
    index = jax.lax.broadcasted_iota(tokens.dtype, logits.shape, 2)
    before = (logits > own) | ((logits == own) & (index < tokens[..., None]))
    return jnp.sum(before, axis=-1, dtype=jnp.int32)


def _sums(weights: Float[Array, "b t"], rows: Mapping[str, Array]) -> Sums:
    """Weighted sums of per-row values, and "count"."""
    sums = {name: jnp.sum(weights * value.astype(jnp.float32)) for name, value in rows.items()}
    return sums | {"count": jnp.sum(weights)}


def means(sums: Mapping[str, Any]) -> dict[str, Any]:
    """Sums over their count: masked means, 0 where nothing is marked."""
    count = jnp.maximum(sums["count"], 1.0)
    return {name: value / count for name, value in sums.items() if name != "count"}


def _matrices(params: Mapping[str, Any]) -> int:
    """Elements of all matrices that tokens are multiplied by (a looked-up embedding is not)."""
    return sum(
        x.size for name, x in params.items() if x.ndim == 2 and not name.startswith("embed_tokens")
    )


def _layer_flops(config: configs.TransformerConfig, sequence_length: int) -> float:
    """Forward attention FLOPs per token and layer: two products of [h, e] by half the sequence."""
    return 2.0 * config.num_attention_heads * config.head_dim * sequence_length


def transformer_flops(
    config: configs.TransformerConfig, sequence_length: int
) -> tuple[float, float]:
    """Forward FLOPs per token of the layers and of the head.

    Two per matrix element, plus attention over the causal half of the sequence (packing into
    segments is not subtracted). Training costs three times as much: forward, and twice that
    backward. Recomputation is not counted: these are model FLOPs.
    """
    shapes = jax.eval_shape(lambda: init_params(Transformer, config, 0))
    head = 2.0 * config.hidden_size * config.vocab_size
    body = 2.0 * _matrices(shapes) - (0.0 if config.tie_word_embeddings else head)
    return body + config.num_hidden_layers * _layer_flops(config, sequence_length), head


@jax.custom_vjp
def _project(features: Float[Array, "b t d"], kernel: Float[Array, "d v"]) -> Logits:
    """`features @ kernel` with float32 results, whose backward products run in the input dtype.

    The plain transpose multiplies float32 cotangents by bfloat16 weights. On an H100 that costs 3 %
    of a whole step at vocabulary 8k and width 512, and the head's share grows with the vocabulary.
    """
    return jnp.matmul(features, kernel, preferred_element_type=jnp.float32)


def _project_forward(features: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _project(features, kernel), (features, kernel)


def _project_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    features, kernel = saved
    gradient = gradient.astype(features.dtype)
    return gradient @ kernel.T, jnp.einsum("btd,btv->dv", features, gradient)


_project.defvjp(_project_forward, _project_backward)


def _head_kernel(config: configs.TransformerConfig, params: ParamDict) -> Float[Array, "d v"]:
    if config.tie_word_embeddings:
        return params["embed_tokens.embedding"].T
    return params["lm_head.kernel"]


@dataclasses.dataclass(frozen=True)
class NextTokenObjective:
    """Cross-entropy of the next token on assistant tokens.

    Attributes:
        config: the architecture.
        kernel, remat: as in `TrainConfig` (`attention`, `remat`).
    """

    config: configs.TransformerConfig
    kernel: AttentionKernel = "xla"
    remat: bool = False

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def init(self, seed: int) -> ParamDict:
        return init_params(Transformer, self.config, seed)

    def frozen(self) -> Mapping[str, Any]:
        return {}

    def loss(
        self, trainable: ParamDict, frozen: ParamDict, batch: Batch, key: jax.Array | None
    ) -> tuple[jax.Array, Sums]:
        del frozen, key
        model = bind(Transformer, self.config, trainable)
        mask = packed_mask(batch["segment_ids"])
        features = model(
            batch["tokens"], batch["positions"], mask, kernel=self.kernel, remat=self.remat
        ).features
        labels = shift(batch["tokens"], 1)

        def rows(features: Hidden, head: Array) -> dict[str, Array]:
            logits = _project(features, head)
            own = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
            return {
                "loss": jax.nn.logsumexp(logits, axis=-1) - own,
                "top1": rank(logits, labels) < 1,
            }

        rows = jax.checkpoint(rows) if self.remat else rows
        sums = _sums(next_weights(batch, 1), rows(features, _head_kernel(self.config, trainable)))
        return means(sums)["loss"], sums

    def flops_per_token(self, sequence_length: int) -> float:
        return 3.0 * sum(transformer_flops(self.config, sequence_length))

    def export(
        self, directory: Path, params: Mapping[str, Any], dtype: str, tokenizer: Path
    ) -> None:
        special = Tokenizer.load(tokenizer)
        hf.save_target(
            directory,
            self.config,
            params,
            dtype,
            bos_token_id=special.bos_id,
            eos_token_id=special.eos_ids or None,
        )
        _copy_tokenizer(tokenizer, directory)


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureRegressionObjective:
    """EAGLE-1: smooth L1 to the target's features, soft cross-entropy through its head.

    The frozen target runs online on the same batch. Noise is uniform, on input features only,
    fresh in every step.

    Attributes:
        settings: weights, noise, and the draft's architecture.
        target_config, target: the frozen target.
        kernel, remat: as in `TrainConfig` (`attention`, `remat`).
    """

    settings: configs.FeatureRegression
    target_config: configs.TransformerConfig
    target: Mapping[str, Any] = dataclasses.field(repr=False)
    kernel: AttentionKernel = "xla"
    remat: bool = False

    @property
    def vocab_size(self) -> int:
        return self.target_config.vocab_size

    def init(self, seed: int) -> ParamDict:
        return init_params(EagleDraft, self.settings.draft, seed)

    def frozen(self) -> Mapping[str, Any]:
        return self.target

    def loss(
        self, trainable: ParamDict, frozen: ParamDict, batch: Batch, key: jax.Array | None
    ) -> tuple[jax.Array, Sums]:
        mask = packed_mask(batch["segment_ids"])
        frozen = jax.lax.stop_gradient(frozen)
        target = bind(Transformer, self.target_config, frozen)
        features = target(batch["tokens"], batch["positions"], mask, kernel=self.kernel).features
        embeddings = target.embed_tokens(shift(batch["tokens"], 1))
        read = features if key is None else features + self._noise(key, features)
        predicted = self._draft(trainable, embeddings, read, batch["positions"], mask)
        head = _head_kernel(self.target_config, frozen)
        rows = jax.checkpoint(_regression_rows) if self.remat else _regression_rows
        sums = _sums(next_weights(batch, 2), rows(predicted, shift(features, 1), head))
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
        draft = 2.0 * _matrices(shapes) + _layer_flops(layer, sequence_length)
        body, head = transformer_flops(self.target_config, sequence_length)
        # Target and its head forward; the draft forward and backward; the frozen head once more
        # forward on predicted features, and backward to them only.
        return body + head + 3.0 * draft + 2.0 * head

    def export(
        self, directory: Path, params: Mapping[str, Any], dtype: str, tokenizer: Path
    ) -> None:
        del tokenizer  # the target has it
        hf.save_draft(directory, self.settings.draft, params, dtype)


def _regression_rows(
    predicted: Hidden, real: Hidden, head: Float[Array, "d v"]
) -> dict[str, Float[Array, "b t"]]:
    """Both losses and the agreement of every row, float32."""
    error = jnp.abs(predicted.astype(jnp.float32) - real.astype(jnp.float32))
    smooth = jnp.where(error < 1.0, 0.5 * error * error, error - 0.5)
    target_logits, draft_logits = _project(real, head), _project(predicted, head)
    target_probs = jax.nn.softmax(target_logits, axis=-1)
    place = rank(draft_logits, jnp.argmax(target_logits, axis=-1).astype(jnp.int32))
    cross = jnp.sum(target_probs * draft_logits, axis=-1)
    return {
        "feature_loss": jnp.mean(smooth, axis=-1),
        "token_loss": jax.nn.logsumexp(draft_logits, axis=-1) - cross,
        "top1": place < 1,
        "top3": place < 3,
    }


def _copy_tokenizer(source: Path, directory: Path) -> None:
    folder = source if source.is_dir() else source.parent
    for name in _TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, directory / name)
    if source.is_file():  # whatever its own name is
        shutil.copyfile(source, directory / "tokenizer.json")


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
    """The objective of a run; reads the frozen target where there is one.

    Raises:
        ValueError: the target is missing, or the draft does not fit it.
    """
    settings = config.objective
    if isinstance(settings, configs.NextToken):
        _check_length("objective.model", settings.model, config)
        return NextTokenObjective(settings.model, config.attention, config.remat)
    target_config, target = hf.load_target(target_directory(settings.target))
    hf.check_fit(target_config, settings.draft)
    _check_length("objective.target", target_config, config)
    return FeatureRegressionObjective(
        settings, target_config, target, config.attention, config.remat
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


__all__ = [
    "Batch",
    "FeatureRegressionObjective",
    "NextTokenObjective",
    "Objective",
    "Sums",
    "build",
    "means",
]
