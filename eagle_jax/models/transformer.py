"""The target: one decoder-only transformer; model families differ only in their configuration.

Layers are unrolled: inside the decoding loop a scan over stacked layers copies every layer's
weights out of the stack (measured: 3x slower).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Int

from eagle_jax.config import TransformerConfig
from eagle_jax.layout import PLAIN, Layout
from eagle_jax.models.attention import AttentionKernel, soft_cap
from eagle_jax.models.cache import Cache
from eagle_jax.models.layers import DecoderLayer
from eagle_jax.models.linear import Embedding, Linear
from eagle_jax.models.norm import RMSNorm, add_norm
from eagle_jax.models.per_device import CACHE, ROWS, per_device
from eagle_jax.sharding import constrain
from eagle_jax.types import Hidden, Logits

SCORES = ("batch", None, "vocab")  # logical axes of vocabulary scores


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """Named intermediates of one forward pass; jit removes those that are not used.

    Attributes:
        features: [b, t, d] after the final norm: the input of the head, which EAGLE-1 predicts.
        residuals: [b, t, d] entering each layer, and leaving the last (Hugging Face's
            `hidden_states` before the final norm); EAGLE-3 fuses some of these.
        block: keys and values [b, k, t, e] of the block's tokens, per layer; not yet in any cache.
    """

    features: Hidden
    residuals: tuple[Hidden, ...]
    block: Cache


def embedding(config: TransformerConfig, layout: Layout = PLAIN, *, rngs: nnx.Rngs) -> Embedding:
    """Returns only the token embedding of a transformer; it is the same in every layout."""
    del layout
    d = config.hidden_size
    scale = d**0.5 if config.scale_embeddings else None
    return Embedding(config.vocab_size, d, scale=scale, rngs=rngs)


class Transformer(nnx.Module):
    """Embedding, decoder layers, final norm, head."""

    def __init__(
        self, config: TransformerConfig, layout: Layout = PLAIN, *, rngs: nnx.Rngs
    ) -> None:
        d, offset = config.hidden_size, config.unit_offset_norm
        self.embed_tokens = embedding(config, rngs=rngs)
        self.layers = nnx.List(
            DecoderLayer(config, layout, layer=i, rngs=rngs)
            for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(d, config.rms_norm_eps, unit_offset=offset, rngs=rngs)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else Linear(d, config.vocab_size, quantization=layout.quantize, rngs=rngs)
        )
        self.softcap = config.final_logit_softcapping

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        positions: Int[Array, "b t"],
        mask: Bool[Array, "b t t"],
        *,
        cache: Cache | None = None,
        lengths: Int[Array, " b"] | None = None,
        kernel: AttentionKernel = "xla",
        remat: bool = False,
    ) -> Output:
        """Runs the model over a block of tokens.

        Args:
            tokens: the block: a prompt, a packed training sequence, or the nodes of a tree.
            positions: rotary position of each token; nodes of equal depth share one.
            mask: which block tokens each block token sees (itself included).
            cache: read-only keys and values of earlier tokens, each in the slot of its position.
                A layer attends to all used slots, or to those within its sliding window.
            lengths: number of used cache slots, per row.
            kernel: attention kernel; "cudnn" works only without a cache, "aligned" only with one.
            remat: whether to recompute each layer in the backward pass.
        """

        def decoder(own, x, positions, mask, cache, lengths):
            residuals, block, update = [], [], None
            for i, layer in enumerate(own["layers"]):
                prefix = None if cache is None else cache[i]

                def step(layer, x, update, prefix=prefix):  # bind the loop's variable for remat
                    cached = {"prefix": prefix, "lengths": lengths, "kernel": kernel}
                    return layer.step(x, update, positions, mask, **cached)

                entered, x, update, pair = (nnx.remat(step) if remat else step)(layer, x, update)
                residuals.append(entered)
                block.append(pair)
            assert update is not None  # there is a layer
            x, features = add_norm(x, update, own["norm"])
            residuals.append(constrain(x, "batch"))
            return features, tuple(residuals), tuple(block)

        x = constrain(self.embed_tokens(tokens), "batch")
        plain = kernel == "xla" and not any(layer.has_experts for layer in self.layers)
        features, residuals, block = per_device(
            decoder,
            {"layers": self.layers, "norm": self.norm},
            (x, positions, mask, cache, lengths),
            (ROWS, ROWS, CACHE),
            possible=plain,
            heads=self.layers[0].self_attn.k_heads,
        )
        return Output(features, residuals, block)

    def logits(self, features: Hidden) -> Logits:
        """Returns the vocabulary head's scores [b, t, v] in float32."""
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        return self.finish(vocabulary_head(head, features))

    def finish(self, logits: Logits) -> Logits:
        """Returns scores with the soft cap, of all tokens or of a draft vocabulary."""
        logits = constrain(logits, *SCORES)
        return logits if self.softcap is None else soft_cap(logits, self.softcap)


def vocabulary_head(head: Linear | Embedding, x: Hidden) -> Logits:
    """Returns the scores [b, t, v] of a head or tied embedding in float32, before any soft cap."""
    name = "embed_tokens" if isinstance(head, Embedding) else "lm_head"

    def run(own, x):
        return own[name].product(x, jnp.float32)

    return per_device(run, {name: head}, (x,), (SCORES,))


def packed_mask(segment_ids: Int[Array, "b t"]) -> Bool[Array, "b t t"]:
    """Returns the causal mask of packed sequences: a token sees its own segment up to itself.

    segments 1 1 2    token 0  x
                      token 1  x x
                      token 2      x
    """
    t = segment_ids.shape[1]
    causal = jnp.tril(jnp.ones((t, t), bool))
    return (segment_ids[:, :, None] == segment_ids[:, None, :]) & causal[None]
