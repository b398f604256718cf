"""Building blocks of target and draft: linear, RMSNorm, rotary embedding, attention, SwiGLU.

Module and attribute names follow Hugging Face's Llama, so that a parameter's dotted path is its
checkpoint name. Matrices are stored [in, out] (Flax's `kernel`): on CPUs XLA multiplies a few rows
by such a matrix at nearly the cost of one row, by its transpose at twice that.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from eagle_jax.config import TransformerConfig
from eagle_jax.types import Hidden, KeyValue

AttentionKernel = Literal["xla", "cudnn"]

_EMBEDDING_STD = 0.02


class Linear(nnx.Module):
    """`x @ kernel (+ bias)`; the last axis of any array.

    Starts with unit gain, or, where it feeds the residual stream (`zero`), at zero: every layer is
    the identity at first, and depth does not slow the start of training down.
    """

    def __init__(
        self, d_in: int, d_out: int, *, bias: bool = False, zero: bool = False, rngs: nnx.Rngs
    ) -> None:
        std = 0.0 if zero else d_in**-0.5
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (d_in, d_out)))
        self.bias = nnx.Param(jnp.zeros(d_out)) if bias else None

    def __call__(self, x: Float[Array, "*lead i"]) -> Float[Array, "*lead o"]:
        y = x @ self.kernel[...]
        if self.bias is None:
            return y
        return y + jnp.broadcast_to(self.bias[...], y.shape)


class Embedding(nnx.Module):
    """Token embedding, [v, d]."""

    def __init__(self, vocab: int, width: int, *, rngs: nnx.Rngs) -> None:
        self.embedding = nnx.Param(
            _EMBEDDING_STD * jax.random.normal(rngs.params(), (vocab, width))
        )

    def __call__(self, tokens: Int[Array, "b t"]) -> Hidden:
        return self.embedding[...].at[tokens].get(mode="clip")


class RMSNorm(nnx.Module):
    """Root-mean-square norm, computed in float32 whatever the dtype of the input."""

    def __init__(self, width: int, eps: float, *, rngs: nnx.Rngs) -> None:
        del rngs
        self.scale = nnx.Param(jnp.ones(width))
        self.eps = eps

    def __call__(self, x: Hidden) -> Hidden:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + jnp.float32(self.eps))
        scale = jnp.broadcast_to(self.scale[...], x.shape)
        return y.astype(x.dtype) * scale


def rotary(
    x: Float[Array, "b t h e"], positions: Int[Array, "b t"], theta: float
) -> Float[Array, "b t h e"]:
    """Rotary position embedding in Hugging Face's layout (halves, not interleaved pairs)."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions.astype(jnp.float32)[:, :, None, None] * frequency[None, None, None, :]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def two_segment_attention(
    query: Float[Array, "b t h e"],
    block: KeyValue,
    mask: Bool[Array, "b t u"],
    prefix: KeyValue | None,
    lengths: Int[Array, " b"] | None,
) -> Float[Array, "b t h e"]:
    """Attention over a read-only prefix cache and a fresh block, joined in one softmax.

    Every query sees prefix slots `0 .. lengths - 1` of its row and the block entries that `mask`
    allows. For a tree of 4 nodes (1 and 2 children of 0, 3 a child of 1) after a prefix of 3:

        slots    0 1 2 . .   block 0 1 2 3
        node 0   x x x             x
        node 1   x x x             x x
        node 2   x x x             x   x
        node 3   x x x             x x   x

    Args:
        query: of the t tokens at hand.
        block: keys and values [b, k, u, e] of the fresh tokens (u >= t where earlier blocks of the
            same round are attended to as well).
        mask: query token -> block token.
        prefix: keys and values [b, k, s, e], or none.
        lengths: used slots of the prefix, per row.

    Returns:
        [b, t, h, e] in the query's dtype; scores and softmax are float32.
    """
    b, t, h, e = query.shape
    k = block[0].shape[1]
    # [b, k, t*g, e]: the g query heads of a key head become rows of one matrix product.
    grouped = query.reshape(b, t, k, h // k, e).transpose(0, 2, 1, 3, 4).reshape(b, k, -1, e)
    grouped = grouped * jnp.asarray(e**-0.5, query.dtype)

    def score(keys: jax.Array, visible: jax.Array) -> jax.Array:
        scores = jnp.einsum("bkqe,bkse->bkqs", grouped, keys, preferred_element_type=jnp.float32)
        return jnp.where(visible, scores, -jnp.inf)

    visible = jnp.repeat(mask, h // k, axis=1)[:, None]
    if prefix is None or lengths is None:
        weights = jax.nn.softmax(score(block[0], visible), axis=-1).astype(query.dtype)
        mixed = jnp.einsum("bkqs,bkse->bkqe", weights, block[1])
    else:
        slots = prefix[0].shape[2]
        used = (jnp.arange(slots)[None, :] < lengths[:, None])[:, None, None, :]
        scores = jnp.concatenate([score(prefix[0], used), score(block[0], visible)], axis=-1)
        weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
        mixed = jnp.einsum("bkqs,bkse->bkqe", weights[..., :slots], prefix[1])
        mixed = mixed + jnp.einsum("bkqs,bkse->bkqe", weights[..., slots:], block[1])
    return mixed.reshape(b, k, t, h // k, e).transpose(0, 2, 1, 3, 4).reshape(b, t, h, e)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions; reads `inputs` times the model's width."""

    def __init__(self, config: TransformerConfig, *, inputs: int = 1, rngs: nnx.Rngs) -> None:
        d, e = inputs * config.hidden_size, config.head_dim
        h, k = config.num_attention_heads, config.num_key_value_heads
        bias = config.attention_bias
        self.q_proj = Linear(d, h * e, bias=bias, rngs=rngs)
        self.k_proj = Linear(d, k * e, bias=bias, rngs=rngs)
        self.v_proj = Linear(d, k * e, bias=bias, rngs=rngs)
        self.o_proj = Linear(h * e, config.hidden_size, zero=True, rngs=rngs)
        self.head_dim = e
        self.theta = config.rope_theta

    def __call__(
        self,
        x: Float[Array, "b t i"],
        positions: Int[Array, "b t"],
        mask: Bool[Array, "b t u"],
        *,
        prefix: KeyValue | None = None,
        lengths: Int[Array, " b"] | None = None,
        before: KeyValue | None = None,
        kernel: AttentionKernel = "xla",
    ) -> tuple[Hidden, KeyValue]:
        """Attend from `x`; returns the mixed values and the block's own keys and values.

        `before` holds keys and values of earlier blocks of the same round (levels of a tree being
        drafted); they come first in `mask`'s last axis. `kernel="cudnn"` takes the fused kernel
        for training, where there is no prefix.
        """
        query, keys, values = self.project(x, positions)
        if kernel == "cudnn":
            mixed = jax.nn.dot_product_attention(
                query, keys, values, mask=mask[:, None], implementation="cudnn"
            )
        block = (keys.transpose(0, 2, 1, 3), values.transpose(0, 2, 1, 3))
        if kernel == "xla":
            seen = block
            if before is not None:
                seen = jax.tree.map(lambda a, c: jnp.concatenate([a, c], axis=2), before, block)
            mixed = two_segment_attention(query, seen, mask, prefix, lengths)
        return self.o_proj(mixed.reshape(*x.shape[:2], -1)), block

    def project(
        self, x: Float[Array, "b t i"], positions: Int[Array, "b t"]
    ) -> tuple[Float[Array, "b t h e"], Float[Array, "b t k e"], Float[Array, "b t k e"]]:
        """Query, keys and values of a block, rotated to their positions."""
        heads = (*x.shape[:2], -1, self.head_dim)
        query = rotary(self.q_proj(x).reshape(heads), positions, self.theta)
        keys = rotary(self.k_proj(x).reshape(heads), positions, self.theta)
        return query, keys, self.v_proj(x).reshape(heads)


class MLP(nnx.Module):
    """SwiGLU feed-forward block.

    Decoding has gate and up projection in one matrix (`fused_mlp`): one product instead of two.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        d, f = config.hidden_size, config.intermediate_size
        if config.fused_mlp:
            self.gate_up_proj = Linear(d, 2 * f, rngs=rngs)
        else:
            self.gate_proj = Linear(d, f, rngs=rngs)
            self.up_proj = Linear(d, f, rngs=rngs)
        self.down_proj = Linear(f, d, zero=True, rngs=rngs)
        self.fused = config.fused_mlp

    def __call__(self, x: Hidden) -> Hidden:
        if self.fused:
            gate, up = jnp.split(self.gate_up_proj(x), 2, axis=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(jax.nn.silu(gate) * up)


def fuse_mlp(params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Parameters for `fused_mlp`: every `gate_proj` and `up_proj` joined to `gate_up_proj`."""
    fused = {}
    for name, value in params.items():
        if name.endswith("mlp.gate_proj.kernel"):
            up = params[name.replace("gate_proj", "up_proj")]
            fused[name.replace("gate_proj", "gate_up_proj")] = np.concatenate([value, up], axis=1)
        elif not name.endswith("mlp.up_proj.kernel"):
            fused[name] = value
    return fused


class DecoderLayer(nnx.Module):
    """Pre-norm decoder layer; EAGLE-1's draft has it without the input norm."""

    def __init__(
        self, config: TransformerConfig, *, input_norm: bool = True, rngs: nnx.Rngs
    ) -> None:
        d, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(d, eps, rngs=rngs) if input_norm else None
        self.self_attn = Attention(config, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(d, eps, rngs=rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(
        self,
        x: Hidden,
        positions: Int[Array, "b t"],
        mask: Bool[Array, "b t u"],
        *,
        prefix: KeyValue | None = None,
        lengths: Int[Array, " b"] | None = None,
        before: KeyValue | None = None,
        kernel: AttentionKernel = "xla",
    ) -> tuple[Hidden, KeyValue]:
        """One layer over a block; arguments as in `Attention`."""
        normed = x if self.input_layernorm is None else self.input_layernorm(x)
        mixed, block = self.self_attn(
            normed,
            positions,
            mask,
            prefix=prefix,
            lengths=lengths,
            before=before,
            kernel=kernel,
        )
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), block
