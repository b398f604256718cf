"""The EAGLE-3 draft (arXiv 2503.01840 section 3.2), compatible with the published code and heads.

`fc` fuses the residual streams of three target layers into one state; later draft steps read the
draft's own states. One decoder layer reads the token's embedding and the state, each normed. Its
own head scores a draft vocabulary, whose entry i is the target's token `i + d2t[i]`.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from eagle_jax.drafters.eagle.module import target_tokens
from eagle_jax.drafters.eagle3.config import Eagle3Config
from eagle_jax.layout import PLAIN, Layout
from eagle_jax.models.attention import AttentionKernel
from eagle_jax.models.layers import MLP, Attention
from eagle_jax.models.linear import Embedding, Linear
from eagle_jax.models.matmul import Product, as_array
from eagle_jax.models.norm import RMSNorm, add_norm
from eagle_jax.models.per_device import CACHE, ROWS, per_device
from eagle_jax.models.transformer import Output, Transformer, vocabulary_head
from eagle_jax.types import Hidden, KeyValue


class Eagle3Layer(nnx.Module):
    """The decoder layer, whose attention reads [embedding ; state], each with its own norm."""

    def __init__(self, config: Eagle3Config, layout: Layout = PLAIN, *, rngs: nnx.Rngs) -> None:
        d, eps, layer = config.hidden_size, config.rms_norm_eps, config.layer()
        self.input_layernorm = RMSNorm(d, eps, rngs=rngs)
        self.hidden_norm = RMSNorm(d, eps, rngs=rngs)
        self.self_attn = Attention(layer, layout, inputs=2, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(d, eps, rngs=rngs)
        self.mlp = MLP(layer, layout, rngs=rngs)

    def read(self, embeddings: Hidden, state: Hidden) -> Float[Array, "b t d2"]:
        """Returns the input of the attention projections: normed embedding and normed state."""
        return jnp.concatenate([self.input_layernorm(embeddings), self.hidden_norm(state)], axis=-1)

    def leave(self, state: Hidden, mixed: Product) -> Hidden:
        """Returns the layer's output, given its input state and the output of attention."""
        state, normed = add_norm(state, mixed, self.post_attention_layernorm)
        return state + as_array(self.mlp(normed))


class Eagle3Draft(nnx.Module):
    """The draft: `fc`, one layer, norm and head; `d2t` is an int32 table of offsets, no weight."""

    def __init__(self, config: Eagle3Config, layout: Layout = PLAIN, *, rngs: nnx.Rngs) -> None:
        d, eps, fused = config.hidden_size, config.rms_norm_eps, len(config.aux_layers)
        wide, quantization = config.feature_size, layout.quantize
        self.embed_tokens = Embedding(config.vocab_size, d, rngs=rngs) if wide != d else None
        self.fc_norm = (
            nnx.List(RMSNorm(wide, eps, rngs=rngs) for _ in range(fused))
            if config.fc_norm
            else None
        )
        self.fc = Linear(fused * wide, d, quantization=quantization, rngs=rngs)
        self.midlayer = Eagle3Layer(config, layout, rngs=rngs)
        self.norm = RMSNorm(d, eps, rngs=rngs)
        self.lm_head = Linear(d, config.draft_vocab_size, quantization=quantization, rngs=rngs)
        self.d2t = nnx.Variable(jnp.zeros(config.draft_vocab_size, jnp.int32))
        self.aux_layers = config.aux_layers
        self.norm_output = config.norm_output

    def features(self, output: Output) -> Float[Array, "b t a"]:
        """Returns the part of the target's output that the draft reads: concatenated streams."""
        return jnp.concatenate([output.residuals[i] for i in self.aux_layers], axis=-1)

    def embed(self, tokens: Int[Array, "b t"], target: Transformer) -> Hidden:
        """Returns embeddings of tokens: the target's, unless the draft has its own embedding."""
        own = self.embed_tokens
        return target.embed_tokens(tokens) if own is None else own(tokens)

    def fuse(self, features: Float[Array, "b t a"]) -> Hidden:
        """Returns the states that the draft reads for the target's features."""
        if self.fc_norm is not None:
            parts = jnp.split(features, len(self.fc_norm), axis=-1)
            pairs = zip(self.fc_norm, parts, strict=True)
            features = jnp.concatenate([norm(part) for norm, part in pairs], axis=-1)

        def run(own, features):
            return own["fc"](features)

        return per_device(run, {"fc": self.fc}, (features,), (ROWS,))

    def __call__(
        self,
        embeddings: Hidden,
        state: Hidden,
        positions: Int[Array, "b t"],
        mask: Bool[Array, "b t u"],
        *,
        prefix: KeyValue | None = None,
        lengths: Int[Array, " b"] | None = None,
        before: KeyValue | None = None,
        kernel: AttentionKernel = "xla",
    ) -> tuple[Hidden, KeyValue]:
        """Returns the next states [b, t, d] and the block's KV; arguments as in `EagleDraft`."""

        def run(own, embeddings, state, positions, mask, prefix, lengths, before):
            cached = {"prefix": prefix, "lengths": lengths, "before": before, "kernel": kernel}
            layer = own["midlayer"]
            read = layer.read(embeddings, state)
            mixed, block = layer.self_attn(read, positions, mask, **cached)
            return layer.leave(state, mixed), block

        state, block = per_device(
            run,
            {"midlayer": self.midlayer},
            (embeddings, state, positions, mask, prefix, lengths, before),
            (ROWS, CACHE),
            possible=kernel == "xla",
            heads=self.midlayer.self_attn.k_heads,
        )
        return self.feed_back(state), block

    def feed_back(self, state: Hidden) -> Hidden:
        """Returns the state in the form that the next draft step reads."""
        return self.norm(state) if self.norm_output else state

    def logits(self, state: Hidden, target: Transformer | None = None) -> Float[Array, "b t v"]:
        """Returns float32 logits over the draft vocabulary for states that `__call__` returned."""
        del target
        normed = state if self.norm_output else self.norm(state)
        return vocabulary_head(self.lm_head, normed)

    def tokens(self) -> Int[Array, " v"]:
        """Returns the target's token of every entry of the draft vocabulary."""
        return target_tokens(self.d2t[...])
