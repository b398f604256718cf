"""The decoder layer of target and drafts: attention with rotary positions, and feed-forward block.

Module and attribute names follow Hugging Face's Llama, so that a parameter's dotted path is its
checkpoint name. The modules `matmul`, `attention` and `norm` select the implementations. A
`Product` may consist of partial sums that its reader still has to add up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from eagle_jax.config import TransformerConfig
from eagle_jax.layout import PLAIN, Layout
from eagle_jax.models.attention import AttentionKernel, attention
from eagle_jax.models.experts import MixtureOfExperts
from eagle_jax.models.heads import Heads, UnsplitHeads, rotated, split, unsplit
from eagle_jax.models.linear import Linear, Stack, weight_of
from eagle_jax.models.matmul import Product, all_reduced, as_array, gated_matmul
from eagle_jax.models.norm import RMSNorm, add_norm
from eagle_jax.sharding import constrain
from eagle_jax.types import Hidden, KeyValue

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions.

    Args:
        config: configuration of the transformer.
        layout: layout of its weights.
        layer: number of the layer; layers may differ in window and rotary base.
        inputs: number of concatenated vectors of the model's width that it reads (EAGLE-3: 2).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layout: Layout = PLAIN,
        *,
        layer: int = 0,
        inputs: int = 1,
        rngs: nnx.Rngs,
    ) -> None:
        d, e = inputs * config.hidden_size, config.head_dim
        h, k = config.num_attention_heads, config.num_key_value_heads
        bias, quantization = config.attention_bias, layout.quantize
        more: dict[str, Any] = {"bias": bias, "quantization": quantization, "rngs": rngs}
        if layout.qkv_fused:
            self.qkv_proj = Linear(d, (h + 2 * k) * e, **more)  # grouped by key head
        else:
            self.q_proj = Linear(d, h * e, **more)
            self.k_proj, self.v_proj = Linear(d, k * e, **more), Linear(d, k * e, **more)
        self.qkv_fused = layout.qkv_fused
        out = config.hidden_size
        self.o_proj = Linear(h * e, out, zero=True, quantization=quantization, rngs=rngs)
        self.q_norm = _norm(config, e, rngs) if config.qk_norm else None
        self.k_norm = _norm(config, e, rngs) if config.qk_norm else None
        self.head_dim, self.q_heads, self.k_heads = e, h, k
        self.window = config.window(layer)
        self.theta, self.scaling = config.rope_theta, config.rope_scaling
        if self.window is not None and config.rope_local_base_freq is not None:
            self.theta, self.scaling = config.rope_local_base_freq, None
        scalar = config.query_pre_attn_scalar
        self.scale = None if scalar is None else scalar**-0.5
        self.softcap = config.attn_logit_softcapping

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
    ) -> tuple[Product, KeyValue]:
        """Returns the attended values, projected back, and the block's own keys and values.

        Args:
            x: the block's inputs.
            positions: rotary position of each token.
            mask: which fresh tokens each token sees: those of `before`, then the block's own.
            prefix: keys and values [b, k, s, e] of the cache, or None.
            lengths: number of used cache slots, per row.
            before: keys and values of earlier blocks of the same round (the levels of a tree
                drafted so far).
            kernel: as in `attention`.
        """
        oldest = None
        if self.window is not None:
            # The positions of `before` are unknown here; only drafts use it, and have no window.
            assert before is None
            oldest = positions - (self.window - 1)
            mask = mask & (positions[:, None, :] >= oldest[:, :, None])
        mixed, block = attention(
            self._heads(x, positions),
            mask,
            positions,
            prefix=prefix,
            lengths=lengths,
            before=before,
            kernel=kernel,
            oldest=oldest,
            scale=self.scale,
            softcap=self.softcap,
        )
        output = self.o_proj.partial(mixed.reshape(*mixed.shape[:2], -1))
        return all_reduced(output, mixed.shape[2], self.q_heads, "heads"), block

    def project(self, x: Float[Array, "b t i"], positions: Int[Array, "b t"]) -> Heads:
        """Returns queries and keys of a block, rotated to their positions, and values."""
        heads = self._heads(x, positions)
        return split(heads) if isinstance(heads, UnsplitHeads) else heads

    def _heads(
        self, x: Float[Array, "b t i"], positions: Int[Array, "b t"]
    ) -> Heads | UnsplitHeads:
        groups, e = self.q_heads // self.k_heads, self.head_dim
        if self.qkv_fused:
            product = self.qkv_proj.partial(x)
            if self.q_norm is None and self.k_norm is None:
                joined = unsplit(product, x, positions, groups, e, self.theta, self.scaling)
                if joined is not None:
                    return joined
            heads = as_array(product).reshape(*x.shape[:2], -1, groups + 2, e)
            query = heads[:, :, :, :-2].reshape(*x.shape[:2], -1, e)
            keys, values = heads[:, :, :, -2], heads[:, :, :, -1]
        else:
            shape = (*x.shape[:2], -1, e)
            query, keys = self.q_proj(x).reshape(shape), self.k_proj(x).reshape(shape)
            values = self.v_proj(x).reshape(shape)
        if self.q_norm is not None and self.k_norm is not None:
            query, keys = self.q_norm(query), self.k_norm(keys)
        return rotated(query, keys, values, positions, self.theta, self.scaling)


def _norm(config: TransformerConfig, width: int, rngs: nnx.Rngs) -> RMSNorm:
    offset = config.unit_offset_norm
    return RMSNorm(width, config.rms_norm_eps, unit_offset=offset, rngs=rngs)


class MLP(nnx.Module):
    """Gated feed-forward block: `down(activation(gate(x)) * up(x))`."""

    def __init__(
        self,
        config: TransformerConfig,
        layout: Layout = PLAIN,
        *,
        width: int | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        d, f = config.hidden_size, width or config.intermediate_size
        quantization = layout.quantize
        if layout.gate_up_fused:
            self.gate_up_proj = Stack((d, 2, f), quantization=quantization, rngs=rngs)
        else:
            self.gate_proj = Linear(d, f, quantization=quantization, rngs=rngs)
            self.up_proj = Linear(d, f, quantization=quantization, rngs=rngs)
        self.down_proj = Linear(f, d, zero=True, quantization=quantization, rngs=rngs)
        self.fused, self.width = layout.gate_up_fused, f
        self.activation = _ACTIVATIONS[config.hidden_act]

    def __call__(self, x: Hidden) -> Product:
        if self.fused:
            hidden = gated_matmul(x, weight_of(self.gate_up_proj), self.activation)
        else:
            hidden = self.activation(self.gate_proj(x)) * self.up_proj(x)
        return all_reduced(self.down_proj.partial(hidden), hidden.shape[-1], self.width, "mlp")


class DecoderLayer(nnx.Module):
    """Pre-norm decoder layer; `post_norms` (Gemma) also normalises what it adds to the stream.

    Args:
        config: configuration of the transformer.
        layout: layout of its weights.
        layer: number of the layer.
        input_norm: whether attention's input is normalised; EAGLE-1's draft has no such norm.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layout: Layout = PLAIN,
        *,
        layer: int = 0,
        input_norm: bool = True,
        rngs: nnx.Rngs,
    ) -> None:
        d = config.hidden_size
        self.input_layernorm = _norm(config, d, rngs) if input_norm else None
        self.self_attn = Attention(config, layout, layer=layer, rngs=rngs)
        # With post-norms this norm follows attention; otherwise it precedes the feed-forward block.
        self.post_attention_layernorm = _norm(config, d, rngs)
        self.pre_feedforward_layernorm = _norm(config, d, rngs) if config.post_norms else None
        self.post_feedforward_layernorm = _norm(config, d, rngs) if config.post_norms else None
        self.has_experts = config.has_experts(layer)
        if self.has_experts:
            activation = _ACTIVATIONS[config.hidden_act]
            self.mlp = MixtureOfExperts(
                config, layout, expert=MLP, activation=activation, rngs=rngs
            )
        else:
            self.mlp = MLP(config, layout, rngs=rngs)

    def __call__(
        self,
        x: Hidden,
        positions: Int[Array, "b t"],
        mask: Bool[Array, "b t u"],
        **cached: Any,
    ) -> tuple[Hidden, KeyValue]:
        """Returns the layer's output, and the block's keys and values; arguments as `Attention`."""
        _, x, update, block = self.step(x, None, positions, mask, **cached)
        return constrain(x + as_array(update), "batch"), block

    def step(
        self,
        x: Hidden,
        update: Product | None,
        positions: Int[Array, "b t"],
        mask: Bool[Array, "b t u"],
        **cached: Any,
    ) -> tuple[Hidden, Hidden, Product, KeyValue]:
        """Runs the layer on `x + update`, and leaves its last addition to the next layer.

        An addition and the norm after it are one operation (`add_norm`), and the norm after the
        last addition belongs to the next layer.

        Args:
            x, update: terms of the residual stream; `update` is None before the first layer.
            positions, mask, cached: as in `Attention`.

        Returns:
            The residual stream that entered the layer, the stream and the update that leave it,
            and the block's keys and values.
        """
        if update is not None:
            assert self.input_layernorm is not None
            x, normed = add_norm(x, update, self.input_layernorm)
            x = constrain(x, "batch")
        else:
            normed = x if self.input_layernorm is None else self.input_layernorm(x)
        entered = x
        attended, block = self.self_attn(normed, positions, mask, **cached)
        before_mlp, after_mlp = self.pre_feedforward_layernorm, self.post_feedforward_layernorm
        if before_mlp is None or after_mlp is None:
            x, normed = add_norm(x, attended, self.post_attention_layernorm)
            return entered, x, self.mlp(normed), block
        x = x + self.post_attention_layernorm(as_array(attended))
        return entered, x, after_mlp(as_array(self.mlp(before_mlp(x)))), block
