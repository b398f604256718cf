"""The EAGLE-1 draft, the FeatExtrapolator (arXiv 2401.15077 section 4.1, figure 6).

It reads pairs (feature of token i, embedding of token i+1), in which the token is one step ahead of
the feature, and predicts the feature of token i+1. The target's frozen head turns this into a
distribution of token i+2. Embedding and head are the target's: this module holds only `fc` and
one decoder layer without input norm.

If the vocabulary is large, most of the cost of a level is the head. With a draft vocabulary (the
idea of FR-Spec, arXiv 2502.14856) the module also holds the head's columns for frequent tokens and
scores only these; entry i is the target's token `i + d2t[i]`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Int

from eagle_jax.drafters.eagle.config import EagleConfig
from eagle_jax.layout import PLAIN, Layout
from eagle_jax.models.attention import AttentionKernel
from eagle_jax.models.layers import DecoderLayer
from eagle_jax.models.linear import Linear
from eagle_jax.models.per_device import CACHE, ROWS, per_device
from eagle_jax.models.transformer import Output, Transformer, vocabulary_head
from eagle_jax.types import Hidden, KeyValue, Logits


class EagleDraft(nnx.Module):
    """Computes `layer(fc([embedding(t_{i+1}) ; f_i]))`, embedding first as in published heads."""

    def __init__(self, config: EagleConfig, layout: Layout = PLAIN, *, rngs: nnx.Rngs) -> None:
        d, quantization = config.hidden_size, layout.quantize
        self.fc = Linear(2 * d, d, bias=config.bias, quantization=quantization, rngs=rngs)
        self.layers = nnx.List([DecoderLayer(config.layer(), layout, input_norm=False, rngs=rngs)])
        known = config.draft_vocab_size
        self.lm_head = (
            None if known is None else Linear(d, known, quantization=quantization, rngs=rngs)
        )
        self.d2t = None if known is None else nnx.Variable(jnp.zeros(known, jnp.int32))

    def __call__(
        self,
        embeddings: Hidden,
        features: Hidden,
        positions: Int[Array, "b t"],
        mask: Bool[Array, "b t u"],
        *,
        prefix: KeyValue | None = None,
        lengths: Int[Array, " b"] | None = None,
        before: KeyValue | None = None,
        kernel: AttentionKernel = "xla",
    ) -> tuple[Hidden, KeyValue]:
        """Predict the next features.

        Args:
            embeddings: embeddings of t_{i+1}, from the target.
            features: f_i: the target's (catch-up, training) or this module's own output (a tree).
            positions: i, the position of the feature (not of the token).
            mask: attention mask of the block; the columns of `before` come first.
            prefix, lengths: the draft's KV cache, computed from the target's features only, and
                the number of valid entries.
            before: keys and values of the levels drafted earlier in this round.

        Returns:
            Predicted features f_{i+1} [b, t, d], and the block's keys and values.
        """

        def run(own, x, positions, mask, prefix, lengths, before):
            cached = {"prefix": prefix, "lengths": lengths, "before": before, "kernel": kernel}
            return own["layers"][0](own["fc"](x), positions, mask, **cached)

        x = jnp.concatenate([embeddings, features], axis=-1)
        return per_device(
            run,
            {"fc": self.fc, "layers": self.layers},
            (x, positions, mask, prefix, lengths, before),
            (ROWS, CACHE),
            possible=kernel == "xla",
            heads=self.layers[0].self_attn.k_heads,
        )

    def features(self, output: Output) -> Hidden:
        """Returns the part of the target's output that the draft reads: the features."""
        return output.features

    def fuse(self, features: Hidden) -> Hidden:
        """Returns the draft's input for the target's features, which are used unchanged."""
        return features

    def embed(self, tokens: Int[Array, "b t"], target: Transformer) -> Hidden:
        """Returns the target's embeddings of tokens."""
        return target.embed_tokens(tokens)

    def logits(self, state: Hidden, target: Transformer) -> Logits:
        """Returns the logits of predicted features by the target's head, or by columns of it."""
        if self.lm_head is None:
            return target.logits(state)
        return target.finish(vocabulary_head(self.lm_head, state))

    def tokens(self) -> Int[Array, " v"] | None:
        """Returns the target's token of every draft vocabulary entry; None without such a table."""
        return None if self.d2t is None else target_tokens(self.d2t[...])


def target_tokens(offsets: Int[Array, " v"]) -> Int[Array, " v"]:
    """Returns the target's token of every entry of a draft vocabulary, given `d2t`."""
    return jax.lax.iota(jnp.int32, offsets.shape[0]) + offsets
