"""The EAGLE-1 draft, the FeatExtrapolator (arXiv 2401.15077 section 4.1, figure 6).

It reads pairs (feature of token i, embedding of token i+1), the token one step ahead of the
feature, and predicts the feature of token i+1; the target's own frozen head turns that into a
distribution of token i+2. Embedding and head are the target's: this module holds only `fc` and
one decoder layer without input norm.

The head is most of what a level costs where the vocabulary is large. With a draft vocabulary (the
idea of FR-Spec, arXiv 2502.14856) the module also holds the head's columns of frequent tokens, and
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
from eagle_jax.models.cache import AXES
from eagle_jax.models.layers import DecoderLayer
from eagle_jax.models.linear import Linear
from eagle_jax.models.per_device import per_device
from eagle_jax.models.transformer import Output, Transformer, vocabulary_head
from eagle_jax.types import Hidden, KeyValue, Logits


class EagleDraft(nnx.Module):
    """`layer(fc([embedding(t_{i+1}) ; f_i]))`, embedding first, as published heads have it."""

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
            embeddings: of t_{i+1}, from the target's embedding.
            features: f_i: real ones (catch-up, training) or this module's own output (a tree).
            positions: i, the position of the feature (not of the token).
            mask: block visibility, `before` first.
            prefix, lengths: the draft cache, which holds only positions fed with real features.
            before: keys and values of the levels drafted earlier in this round.

        Returns:
            Predicted features f_{i+1} [b, t, d], and the block's keys and values.
        """

        def run(own, x, positions, mask, prefix, lengths, before):
            more = {"prefix": prefix, "lengths": lengths, "before": before, "kernel": kernel}
            return own["layers"][0](own["fc"](x), positions, mask, **more)

        own = {"fc": self.fc, "layers": self.layers}
        x = jnp.concatenate([embeddings, features], axis=-1)
        args = (x, positions, mask, prefix, lengths, before)
        rows, heads = ("batch",), self.layers[0].self_attn.k_heads
        axes = (rows, rows, rows, AXES, rows, AXES)
        plain = kernel == "xla"
        return per_device(run, own, args, axes, (rows, AXES), possible=plain, heads=heads)

    def features(self, output: Output) -> Hidden:
        """What is kept of a target pass: its features."""
        return output.features

    def fuse(self, features: Hidden) -> Hidden:
        """The draft's input at positions whose features are the target's own: these."""
        return features

    def embed(self, tokens: Int[Array, "b t"], target: Transformer) -> Hidden:
        """Embeddings of tokens: the target's."""
        return target.embed_tokens(tokens)

    def logits(self, state: Hidden, target: Transformer) -> Logits:
        """Scores of predicted features through the target's head, or its columns that are here."""
        if self.lm_head is None:
            return target.logits(state)
        return target.finish(vocabulary_head(self.lm_head, state))

    def tokens(self) -> Int[Array, " v"] | None:
        """The target's token of every entry of the draft vocabulary; None where that is its own."""
        return None if self.d2t is None else target_tokens(self.d2t[...])


def target_tokens(offsets: Int[Array, " v"]) -> Int[Array, " v"]:
    """The target's token of every entry of a draft vocabulary, from `d2t`."""
    return jax.lax.iota(jnp.int32, offsets.shape[0]) + offsets
