"""Building blocks of target and draft: rotary attention, feed-forward, and the layer of both.

Module and attribute names follow Hugging Face's Llama, so that a parameter's dotted path is its
checkpoint name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from eagle_jax.config import TransformerConfig
from eagle_jax.layout import PLAIN, Layout
from eagle_jax.models import kernels, quantize
from eagle_jax.models.attention import (
    AttentionKernel,
    aligned_attention,
    kernel_attention,
    two_segment_attention,
)
from eagle_jax.models.kernels.attention import Joined, splits
from eagle_jax.models.linear import (
    Linear,
    Parts,
    RMSNorm,
    Weight,
    join,
    matmul,
    matrix,
    over_group,
    total,
    weight_of,
    whole,
)
from eagle_jax.models.quantize import Quantization
from eagle_jax.models.rotary import angles, rotary
from eagle_jax.sharding import constrain, ways_of
from eagle_jax.types import Hidden, KeyValue

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions; reads `inputs` times the model's width.

    `layer` is its number, where layers of a model differ in window and rotary base.
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
            self.qkv_proj = Linear(d, (h + 2 * k) * e, **more)  # key head by key head
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
    ) -> tuple[Hidden | Parts, KeyValue]:
        """Attend from `x`; returns the mixed values and the block's own keys and values.

        `before` holds keys and values of earlier blocks of the same round (levels of a tree being
        drafted); they come first in `mask`'s last axis. `kernel="cudnn"` takes the fused kernel
        for training, where there is no prefix, "aligned" makes results independent of how many
        tokens are verified together (`aligned_attention`).
        """
        product = self._product(x, positions)
        oldest = None
        if self.window is not None:
            # The positions of `before` are not known here; only drafts have it, which see all.
            assert before is None
            oldest = positions - (self.window - 1)
            mask = mask & (positions[:, None, :] >= oldest[:, :, None])
        bounds = {"oldest": oldest, "scale": self.scale, "softcap": self.softcap}
        if isinstance(product, Joined) and before is None and kernel == "xla":
            if prefix is not None and lengths is not None and splits(product, prefix):
                mixed, block = kernel_attention(product, None, mask, prefix, lengths, **bounds)
                return self._out(mixed), block
        query, keys, values = self._split(product, x, positions)
        if kernel == "cudnn":
            if self.softcap is not None:
                raise ValueError(
                    f"attention='cudnn': attn_logit_softcapping={self.softcap} is beyond this "
                    "kernel; use attention='xla'"
                )
            mixed = jax.nn.dot_product_attention(
                query, keys, values, mask=mask[:, None], scale=self.scale, implementation="cudnn"
            )
        block = (keys.transpose(0, 2, 1, 3), values.transpose(0, 2, 1, 3))
        if kernel == "aligned":
            assert before is None and prefix is not None and lengths is not None
            mixed = aligned_attention(query, block, mask, positions, prefix, lengths, **bounds)
        if kernel == "xla":
            seen = block
            if before is not None:
                seen = jax.tree.map(lambda a, c: jnp.concatenate([a, c], axis=2), before, block)
            mixed = two_segment_attention(query, seen, mask, prefix, lengths, **bounds)
        return self._out(mixed), block

    def _out(self, mixed: Float[Array, "b t h e"]) -> Hidden | Parts:
        out = self.o_proj.lazily(mixed.reshape(*mixed.shape[:2], -1))
        return over_group(out, mixed.shape[2], self.q_heads, "heads")

    def project(
        self, x: Float[Array, "b t i"], positions: Int[Array, "b t"]
    ) -> tuple[Float[Array, "b t h e"], Float[Array, "b t k e"], Float[Array, "b t k e"]]:
        """Query, keys and values of a block, rotated to their positions."""
        return self._split(self._product(x, positions), x, positions)

    def _product(
        self, x: Float[Array, "b t i"], positions: Int[Array, "b t"]
    ) -> Joined | Float[Array, "b t o"] | None:
        """Returns queries, keys and values as one product, or None if they are separate.

        Where our kernels run, the product is in their layout.
        """
        if not self.qkv_fused:
            return None
        product = self.qkv_proj.lazily(x)
        g, e = self.q_heads // self.k_heads, self.head_dim
        k = product.shape[-1] // ((g + 2) * e)  # of which some may be elsewhere
        plain = self.q_norm is None and self.k_norm is None
        if plain and isinstance(product, Parts) and kernels.rotary.fits(x, e):
            turn = angles(positions, e // 2, self.theta, self.scaling)
            return Joined(product.array, *turn, (k, g + 2, e), x.dtype)
        return whole(product)

    def _split(
        self,
        product: Joined | Float[Array, "b t o"] | None,
        x: Float[Array, "b t i"],
        positions: Int[Array, "b t"],
    ) -> tuple[Float[Array, "b t h e"], Float[Array, "b t k e"], Float[Array, "b t k e"]]:
        if isinstance(product, Joined):
            grouped, keys, values = kernels.rotary.split(
                product.parts, product.cos, product.sin, product.heads, product.dtype
            )
            (b, k, t, e), g = keys.shape, product.heads[1] - 2
            query = grouped.reshape(b, k, t, g, e).transpose(0, 2, 1, 3, 4)
            query = query.reshape(b, t, k * g, e)
            return query, keys.transpose(0, 2, 1, 3), values.transpose(0, 2, 1, 3)
        if product is not None:
            (b, t), g = x.shape[:2], self.q_heads // self.k_heads
            split = product.reshape(b, t, -1, g + 2, self.head_dim)
            query = split[:, :, :, :-2].reshape(b, t, -1, self.head_dim)
            keys, values = split[:, :, :, -2], split[:, :, :, -1]
        else:
            heads = (*x.shape[:2], -1, self.head_dim)
            query, keys = self.q_proj(x).reshape(heads), self.k_proj(x).reshape(heads)
            values = self.v_proj(x).reshape(heads)
        if self.q_norm is not None and self.k_norm is not None:
            query, keys = self.q_norm(query), self.k_norm(keys)
        query = rotary(query, positions, self.theta, self.scaling)
        keys = rotary(keys, positions, self.theta, self.scaling)
        query, keys, values = constrain((query, keys, values), "batch", None, "heads")
        return query, keys, values


def _norm(config: TransformerConfig, width: int, rngs: nnx.Rngs) -> RMSNorm:
    offset = config.unit_offset_norm
    return RMSNorm(width, config.rms_norm_eps, unit_offset=offset, rngs=rngs)


class MLP(nnx.Module):
    """Gated feed-forward block: SwiGLU, or Gemma's with GELU.

    Decoding has gate and up projection in one array (`Layout.gate_up_fused`): one product, not two.
    """

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
        self.fused, self.silu, self.width = layout.gate_up_fused, config.hidden_act == "silu", f
        self.activation = _ACTIVATIONS[config.hidden_act]

    def __call__(self, x: Hidden) -> Hidden | Parts:
        if self.fused:
            kernel, scale = weight_of(self.gate_up_proj)
            rows = x.reshape(-1, x.shape[-1])
            if self.silu and kernels.skinny_matmul.gates(rows, kernel):
                hidden = kernels.skinny_matmul.gated(rows, kernel, scale).reshape(*x.shape[:-1], -1)
                return self._down(hidden)
            both = matmul(x, kernel, scale=scale)
            gate, up = both[:, :, 0], both[:, :, 1]
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self._down(self.activation(gate) * up)

    def _down(self, hidden: Float[Array, "b t f"]) -> Hidden | Parts:
        return over_group(self.down_proj.lazily(hidden), hidden.shape[-1], self.width, "mlp")


class Stack(nnx.Module):
    """Matrices of the same shape in one array; `axis` is that of their inputs."""

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        axis: int = 0,
        zero: bool = False,
        quantization: Quantization | None,
        rngs: nnx.Rngs,
    ) -> None:
        std = 0.0 if zero else shape[axis] ** -0.5
        self.kernel, self.kernel_scale = matrix(shape, std, quantization, rngs, axis)


class StackedExperts(nnx.Module):
    """The experts of a layer in two arrays (`Layout.gate_up_fused`; x: experts)."""

    def __init__(
        self, config: TransformerConfig, layout: Layout, width: int, *, rngs: nnx.Rngs
    ) -> None:
        experts, d = config.num_experts, config.hidden_size
        more: dict[str, Any] = {"axis": 1, "quantization": layout.quantize, "rngs": rngs}
        self.gate_up_proj = Stack((experts, d, 2, width), **more)
        self.down_proj = Stack((experts, width, d), zero=True, **more)


class MixtureOfExperts(nnx.Module):
    """A router, and feed-forward blocks of which every token goes through a few (Mixtral)."""

    def __init__(
        self, config: TransformerConfig, layout: Layout = PLAIN, *, rngs: nnx.Rngs
    ) -> None:
        width = config.moe_intermediate_size or config.intermediate_size
        self.gate = Linear(config.hidden_size, config.num_experts, rngs=rngs)
        if layout.gate_up_fused:
            self.experts = StackedExperts(config, layout, width, rngs=rngs)
        else:
            self.experts = nnx.List(
                MLP(config, layout, width=width, rngs=rngs) for _ in range(config.num_experts)
            )
        self.count = config.num_experts
        self.chosen, self.normalized = config.num_experts_per_tok, config.norm_topk_prob
        self.activation = _ACTIVATIONS[config.hidden_act]

    def __call__(self, x: Hidden) -> Hidden:
        flat = x.reshape(-1, x.shape[-1])
        weights, experts = self.route(flat)
        # Devices that hold different experts would have to exchange the matrices.
        few = experts.size <= self.count and ways_of("experts", self.count) == 1
        return (self._gathered if few else self._dense)(flat, weights, experts).reshape(x.shape)

    def route(self, x: Float[Array, "n d"]) -> tuple[Float[Array, "n c"], Int[Array, "n c"]]:
        """The chosen experts of each token and their weights, of a softmax over all experts."""
        weights = jax.nn.softmax(self.gate(x).astype(jnp.float32), axis=-1)
        weights, experts = jax.lax.top_k(weights, self.chosen)
        if self.normalized:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return weights.astype(x.dtype), experts

    def matrices(self) -> tuple[Weight, Weight]:
        """Returns gate and up side by side [x, d, 2, f], and down [x, f, d], of all experts.

        In int8 they are [x, 2, f, d] and [x, d, f].
        """
        if isinstance(self.experts, StackedExperts):
            return weight_of(self.experts.gate_up_proj), weight_of(self.experts.down_proj)

        def stack(*weights: Weight, axis: int = 0) -> Weight:
            return jax.tree.map(lambda *arrays: jnp.stack(arrays, axis), *weights)

        experts = list(self.experts)
        axis = 1 if experts[0].gate_proj.kernel_scale is None else 0
        gate_up = [stack(weight_of(e.gate_proj), weight_of(e.up_proj), axis=axis) for e in experts]
        return stack(*gate_up), stack(*(weight_of(expert.down_proj) for expert in experts))

    def _gathered(
        self, x: Float[Array, "n d"], weights: Float[Array, "n c"], experts: Int[Array, "n c"]
    ) -> Float[Array, "n d"]:
        """A few tokens: only the matrices of their experts are read."""
        gate_up, (down, scale) = jax.tree.map(lambda array: array[experts], self.matrices())
        hidden = self._gated(quantize.einsum("nd,ncdgf->ncgf", x, *gate_up))
        if scale is None:
            return jnp.einsum("ncf,ncfd,nc->nd", hidden, down, weights)
        left = quantize.einsum("ncf,ncfd->ncd", hidden, down, scale)
        return jnp.einsum("ncd,nc->nd", left, weights)

    def _dense(
        self, x: Float[Array, "n d"], weights: Float[Array, "n c"], experts: Int[Array, "n c"]
    ) -> Float[Array, "n d"]:
        """Many tokens, which together need nearly every expert: each goes through all of them.

        Arithmetic is spent to read every matrix once, in place.
        """
        (gate_up, gate_up_scale), (down, scale) = self.matrices()
        if gate_up_scale is not None:
            gate_up_scale = gate_up_scale[:, None]
        chosen = experts[:, :, None] == jnp.arange(self.count)[None, None, :]
        share = jnp.sum(jnp.where(chosen, weights[:, :, None], 0), axis=1)  # [n, x]
        hidden = self._gated(quantize.einsum("nd,xdgf->xngf", x, gate_up, gate_up_scale))
        hidden = hidden * share.T[:, :, None]
        if scale is None:
            return jnp.einsum("xnf,xfd->nd", hidden, down)
        # Experts have scales of their own: their results are summed after them.
        return jnp.sum(quantize.einsum("xnf,xfd->xnd", hidden, down, scale[:, None]), axis=0)

    def _gated(self, gate_up: jax.Array) -> jax.Array:
        return self.activation(gate_up[..., 0, :]) * gate_up[..., 1, :]


class DecoderLayer(nnx.Module):
    """Pre-norm decoder layer, with `post_norms` one that norms also what it adds.

    EAGLE-1's draft has it without the input norm. `layer` is its number in the model.
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
        # With post-norms this one comes after attention; without them, before the block.
        self.post_attention_layernorm = _norm(config, d, rngs)
        self.pre_feedforward_layernorm = _norm(config, d, rngs) if config.post_norms else None
        self.post_feedforward_layernorm = _norm(config, d, rngs) if config.post_norms else None
        self.has_experts = config.has_experts(layer)
        mlp = MixtureOfExperts if self.has_experts else MLP
        self.mlp = mlp(config, layout, rngs=rngs)

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
        _, x, added, block = self.step(
            x,
            None,
            positions,
            mask,
            prefix=prefix,
            lengths=lengths,
            before=before,
            kernel=kernel,
        )
        return constrain(total(x, added), "batch"), block

    def step(
        self,
        x: Hidden,
        added: Hidden | Parts | None,
        positions: Int[Array, "b t"],
        mask: Bool[Array, "b t u"],
        **more: Any,
    ) -> tuple[Hidden, Hidden, Hidden | Parts, KeyValue]:
        """The layer over `x + added`, and without its own last addition.

        Returns:
            The residual stream that entered the layer, the stream and what is to be added to it,
            and the block's keys and values.
        """
        if added is not None:
            assert self.input_layernorm is not None
            x, normed = join(x, added, self.input_layernorm)
            x = constrain(x, "batch")
        else:
            normed = x if self.input_layernorm is None else self.input_layernorm(x)
        entered = x
        mixed, block = self.self_attn(normed, positions, mask, **more)
        before_mlp, after_mlp = self.pre_feedforward_layernorm, self.post_feedforward_layernorm
        if before_mlp is None or after_mlp is None:
            x, normed = join(x, mixed, self.post_attention_layernorm)
            return entered, x, self.mlp(normed), block
        x = x + self.post_attention_layernorm(whole(mixed))
        return entered, x, after_mlp(whole(self.mlp(before_mlp(x)))), block
