"""The interface of objectives, and what they share: row weights, sums, FLOPs, projections."""

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

# Names as in `eagle_jax.train.data`: tokens, positions, segment_ids, loss_mask; each [b, t]. A
# batch with stored features also has the arrays of `target.compress`.
Batch = Mapping[str, jax.Array]
# Sums over the weighted rows of a batch; "count" is the sum of weights.
Sums = dict[str, jax.Array]

# From arXiv 2602.23881: the weight of KL falls with the acceptance rate as exp(-3 rate).
_LK_SLOPE = 3.0


@runtime_checkable
class Objective(Protocol):
    """What the training loop calls. Arithmetic runs in the dtype of the parameters."""

    @property
    def vocab_size(self) -> int:
        """The vocabulary size; every token id must be below it."""
        ...

    def init(self, seed: int, frozen: Mapping[str, Any]) -> ParamDict:
        """Returns the initial float32 parameters: copied from `frozen` where possible, else random.

        Args:
            seed: seed of the random parameters.
            frozen: as `frozen()` returns it, or its traced arrays.
        """
        ...

    def frozen(self) -> Mapping[str, Any]:
        """Returns the parameters that are not trained; `loss` gets them as an argument."""
        ...

    def loss(
        self, trainable: ParamDict, frozen: ParamDict, batch: Batch, key: jax.Array | None
    ) -> tuple[jax.Array, Sums]:
        """Returns the masked mean loss, and the sums and the count for the loss and the metrics.

        Validation passes no `key`, and then nothing is random.
        """
        ...

    def flops_per_token(self, sequence_length: int) -> float:
        """Returns the model FLOPs of one training step per token; see `transformer_flops`."""
        ...

    def export(
        self, directory: Path, params: Mapping[str, Any], dtype: str, tokenizer: Path
    ) -> None:
        """Writes the trained weights in the public format; for a target, also the tokenizer."""
        ...


def shift(x: Array, by: int) -> Array:
    """Returns `x` shifted left: `x[:, i + by]` at row i, zeros past the end."""
    by = min(by, x.shape[1])
    return jnp.pad(x[:, by:], [(0, 0), (0, by)] + [(0, 0)] * (x.ndim - 2))


def next_weights(batch: Batch, ahead: int) -> Float[Array, "b t"]:
    """Returns row weights for predicting the token `ahead` rows later.

    A weight is that token's `loss_mask`, or 0 if the token lies in another segment.
    """
    segments = batch["segment_ids"]
    together = segments > 0
    for by in range(1, ahead + 1):
        together &= segments == shift(segments, by)
    return jnp.where(together, shift(batch["loss_mask"], ahead), 0.0)


def rank(logits: Logits, tokens: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """Returns the rank of `tokens` by descending `logits`, from 0; ties rank by token id.

    Counting over the vocabulary is several times cheaper than `lax.top_k` of every row.
    """
    own = jnp.take_along_axis(logits, tokens[..., None], axis=-1)
    index = jax.lax.broadcasted_iota(tokens.dtype, logits.shape, 2)
    before = (logits > own) | ((logits == own) & (index < tokens[..., None]))
    return jnp.sum(before, axis=-1, dtype=jnp.int32)


def weighted_sums(weights: Float[Array, "b t"], rows: Mapping[str, Array]) -> Sums:
    """Returns weighted sums of per-row values, and the sum of weights as "count"."""
    sums = {name: jnp.sum(weights * value.astype(jnp.float32)) for name, value in rows.items()}
    return sums | {"count": jnp.sum(weights)}


def means(sums: Mapping[str, Any]) -> dict[str, Any]:
    """Returns masked means: the sums divided by their count, or 0 if no row counts."""
    count = jnp.maximum(sums["count"], 1.0)
    return {name: value / count for name, value in sums.items() if name != "count"}


def matrices(params: Mapping[str, Any]) -> int:
    """Returns the number of elements in all matrices, without the embedding table."""
    return sum(
        x.size for name, x in params.items() if x.ndim == 2 and not name.startswith("embed_tokens")
    )


def attention_flops(config: configs.TransformerConfig, sequence_length: int) -> float:
    """Returns forward attention FLOPs per token and layer, over half the sequence (causal)."""
    return 2.0 * config.num_attention_heads * config.head_dim * sequence_length


def transformer_flops(
    config: configs.TransformerConfig, sequence_length: int
) -> tuple[float, float]:
    """Returns the forward FLOPs per token of the layers, and those of the head.

    Each matrix element counts two FLOPs, and attention covers the causal half of the sequence
    (packing into segments is not subtracted). Training costs three times as much: the forward pass,
    and twice that for the backward pass. Model FLOPs do not count recomputation.
    """
    shapes = jax.eval_shape(lambda: init_params(Transformer, config, 0))
    head = 2.0 * config.hidden_size * config.vocab_size
    body = 2.0 * matrices(shapes) - (0.0 if config.tie_word_embeddings else head)
    return body + config.num_hidden_layers * attention_flops(config, sequence_length), head


@jax.custom_vjp
def project(features: Float[Array, "b t d"], kernel: Float[Array, "d v"]) -> Logits:
    """Returns `features @ kernel` in float32; its backward products run in the input dtype.

    The default gradient multiplies float32 cotangents by bfloat16 weights. On an H100 that costs
    3 % of a whole step at vocabulary 8k and width 512, and more with a larger vocabulary.
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
    """Returns the matrix of a transformer's vocabulary head."""
    if config.tie_word_embeddings:
        return params["embed_tokens.embedding"].T
    return params["lm_head.kernel"]


def soft_labels(
    features: Hidden, kernel: Float[Array, "d v"]
) -> tuple[Float[Array, "b t v"], Int[Array, "b t"]]:
    """Returns the target's distribution, in the dtype of the features, and its top token.

    Storing probabilities in bfloat16 gives a relative error of 0.2 %. Storing logits would give
    up to 6 % at logits of 20.
    """
    logits = project(features, kernel)
    probs = jax.nn.softmax(logits, axis=-1).astype(features.dtype)
    return probs, jnp.argmax(logits, axis=-1).astype(jnp.int32)


def cross_entropy(
    logits: Float[Array, "b t v"], probs: Float[Array, "b t v"]
) -> Float[Array, "b t"]:
    """Returns the cross-entropy of every row with the soft labels `probs`."""
    return -jnp.sum(probs.astype(jnp.float32) * jax.nn.log_softmax(logits, axis=-1), axis=-1)


def acceptance_loss(
    logits: Float[Array, "b t v"],
    probs: Float[Array, "b t v"],
    entropy: Float[Array, "b t"],
    mass: Float[Array, "b t"] | None = None,
) -> Float[Array, "b t"]:
    """Returns KL and total variation of every row, mixed by acceptance rate (arXiv 2602.23881).

    The rate is that of speculative sampling: target probability outside the draft's vocabulary
    counts as rejected, and total variation is one minus the rate. KL uses the target distribution
    renormalised over the draft's vocabulary, because it would be infinite otherwise.

    Args:
        logits: logits of the draft.
        probs, entropy: the target's renormalised distribution over the draft's vocabulary, and its
            entropy.
        mass: the target's total probability of that vocabulary; None means 1.
    """
    own = jax.nn.softmax(logits, axis=-1)
    wanted = probs.astype(jnp.float32)
    wanted = wanted if mass is None else mass[..., None] * wanted
    rate = jnp.sum(jnp.minimum(wanted, own), axis=-1)
    share = jnp.exp(-_LK_SLOPE * jax.lax.stop_gradient(rate))
    divergence = cross_entropy(logits, probs) - entropy
    return share * divergence + (1.0 - share) * (1.0 - rate)
