"""What every objective is made of: the interface, weights of rows, sums, FLOPs, projections."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from eagle_jax import config as configs
from eagle_jax.models import Transformer, init_params
from eagle_jax.types import Hidden, Logits, ParamDict

# Names as in `eagle_jax.train.data`: tokens, positions, segment_ids, loss_mask; each [b, t]. With
# stored features also those of `target.compress`.
Batch = Mapping[str, jax.Array]
# Sums over the weighted rows of a batch; "count" is the sum of weights.
Sums = dict[str, jax.Array]

# Of arXiv 2602.23881: the weight of KL falls with the acceptance rate as exp(-3 rate).
_LK_SLOPE = 3.0


@runtime_checkable
class Objective(Protocol):
    """What the loop needs of an objective. Arithmetic runs in the dtype of the parameters."""

    @property
    def vocab_size(self) -> int:
        """Tokens must be below it."""
        ...

    def init(self, seed: int, frozen: Mapping[str, Any]) -> ParamDict:
        """The float32 parameters before the first step, random where `frozen` gives none.

        Args:
            seed: of the random ones.
            frozen: as `frozen()` returns it, or traced.
        """
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
    by = min(by, x.shape[1])
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


def weighted_sums(weights: Float[Array, "b t"], rows: Mapping[str, Array]) -> Sums:
    """Weighted sums of per-row values, and "count"."""
    sums = {name: jnp.sum(weights * value.astype(jnp.float32)) for name, value in rows.items()}
    return sums | {"count": jnp.sum(weights)}


def means(sums: Mapping[str, Any]) -> dict[str, Any]:
    """Sums over their count: masked means, 0 where nothing is marked."""
    count = jnp.maximum(sums["count"], 1.0)
    return {name: value / count for name, value in sums.items() if name != "count"}


def matrices(params: Mapping[str, Any]) -> int:
    """Elements of all matrices that tokens are multiplied by (a looked-up embedding is not)."""
    return sum(
        x.size for name, x in params.items() if x.ndim == 2 and not name.startswith("embed_tokens")
    )


def attention_flops(config: configs.TransformerConfig, sequence_length: int) -> float:
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
    body = 2.0 * matrices(shapes) - (0.0 if config.tie_word_embeddings else head)
    return body + config.num_hidden_layers * attention_flops(config, sequence_length), head


@jax.custom_vjp
def project(features: Float[Array, "b t d"], kernel: Float[Array, "d v"]) -> Logits:
    """`features @ kernel` with float32 results, whose backward products run in the input dtype.

    The plain transpose multiplies float32 cotangents by bfloat16 weights. On an H100 that costs 3 %
    of a whole step at vocabulary 8k and width 512, and the head's share grows with the vocabulary.
    """
    return jnp.matmul(features, kernel, preferred_element_type=jnp.float32)


def _project_forward(features: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return project(features, kernel), (features, kernel)


def _project_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    features, kernel = saved
    gradient = gradient.astype(features.dtype)
    return gradient @ kernel.T, jnp.einsum("btd,btv->dv", features, gradient)


project.defvjp(_project_forward, _project_backward)


def head_kernel(config: configs.TransformerConfig, params: ParamDict) -> Float[Array, "d v"]:
    """The vocabulary matrix that a transformer's features are multiplied by."""
    if config.tie_word_embeddings:
        return params["embed_tokens.embedding"].T
    return params["lm_head.kernel"]


def soft_labels(
    features: Hidden, kernel: Float[Array, "d v"]
) -> tuple[Float[Array, "b t v"], Int[Array, "b t"]]:
    """The target's distribution, in the dtype of the features, and its most likely token.

    Probabilities in bfloat16 are off by 0.2 % of themselves whatever their size, logits of 20
    would be by 6 % of the probability.
    """
    logits = project(features, kernel)
    probs = jax.nn.softmax(logits, axis=-1).astype(features.dtype)
    return probs, jnp.argmax(logits, axis=-1).astype(jnp.int32)


def cross_entropy(
    logits: Float[Array, "b t v"], probs: Float[Array, "b t v"]
) -> Float[Array, "b t"]:
    """Soft cross-entropy of every row."""
    return -jnp.sum(probs.astype(jnp.float32) * jax.nn.log_softmax(logits, axis=-1), axis=-1)


def acceptance_loss(
    logits: Float[Array, "b t v"],
    probs: Float[Array, "b t v"],
    entropy: Float[Array, "b t"],
    mass: Float[Array, "b t"] | None = None,
) -> Float[Array, "b t"]:
    """KL and total variation of every row, weighed by the acceptance rate (arXiv 2602.23881).

    The rate is that of speculative sampling from the target: what the target gives to tokens
    outside the draft's vocabulary is lost, and total variation is one minus the rate. KL compares
    with the renormalised distribution, since the other would be infinite.

    Args:
        logits: of the draft.
        probs, entropy: of the target, over the draft's vocabulary.
        mass: what the target gives to that vocabulary, if it is not all.
    """
    own = jax.nn.softmax(logits, axis=-1)
    wanted = probs.astype(jnp.float32)
    wanted = wanted if mass is None else mass[..., None] * wanted
    rate = jnp.sum(jnp.minimum(wanted, own), axis=-1)
    share = jnp.exp(-_LK_SLOPE * jax.lax.stop_gradient(rate))
    divergence = cross_entropy(logits, probs) - entropy
    return share * divergence + (1.0 - share) * (1.0 - rate)
