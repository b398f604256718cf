"""Mixture of experts (Mixtral, Qwen3-MoE): a router that picks a few feed-forward blocks per token.

This module selects the computation: few tokens read only the matrices of their chosen experts, many
tokens read the matrices of every expert once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from eagle_jax.config import TransformerConfig
from eagle_jax.layout import PLAIN, Layout
from eagle_jax.models import quantize
from eagle_jax.models.linear import Linear, Stack, weight_of
from eagle_jax.models.matmul import Weight
from eagle_jax.sharding import parts_of
from eagle_jax.types import Hidden


class StackedExperts(nnx.Module):
    """The experts of a layer in two arrays (`Layout.gate_up_fused`): [x, d, 2, f] and [x, f, d]."""

    def __init__(
        self, config: TransformerConfig, layout: Layout, width: int, *, rngs: nnx.Rngs
    ) -> None:
        experts, d = config.num_experts, config.hidden_size
        more: dict[str, Any] = {"axis": 1, "quantization": layout.quantize, "rngs": rngs}
        self.gate_up_proj = Stack((experts, d, 2, width), **more)
        self.down_proj = Stack((experts, width, d), zero=True, **more)


class MixtureOfExperts(nnx.Module):
    """A router and feed-forward blocks; every token goes through a few of the blocks.

    Args:
        config: configuration of the transformer.
        layout: layout of its weights.
        expert: makes an expert of a given width (`layers.MLP`).
        activation: activation of the gates.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layout: Layout = PLAIN,
        *,
        expert: Callable[..., nnx.Module],
        activation: Callable[[jax.Array], jax.Array],
        rngs: nnx.Rngs,
    ) -> None:
        width = config.moe_intermediate_size or config.intermediate_size
        self.gate = Linear(config.hidden_size, config.num_experts, rngs=rngs)
        if layout.gate_up_fused:
            self.experts = StackedExperts(config, layout, width, rngs=rngs)
        else:
            self.experts = nnx.List(
                expert(config, layout, width=width, rngs=rngs) for _ in range(config.num_experts)
            )
        self.count = config.num_experts
        self.chosen, self.normalized = config.num_experts_per_tok, config.norm_topk_prob
        self.activation = activation

    def __call__(self, x: Hidden) -> Hidden:
        flat = x.reshape(-1, x.shape[-1])
        weights, experts = self.route(flat)
        # With experts on different devices, gathering would have to exchange their matrices.
        few = experts.size <= self.count and parts_of("experts", self.count) == 1
        return (self._gathered if few else self._dense)(flat, weights, experts).reshape(x.shape)

    def route(self, x: Float[Array, "n d"]) -> tuple[Float[Array, "n c"], Int[Array, "n c"]]:
        """Returns weights (by a softmax over all experts) and numbers of each token's experts."""
        weights = jax.nn.softmax(self.gate(x).astype(jnp.float32), axis=-1)
        weights, experts = jax.lax.top_k(weights, self.chosen)
        if self.normalized:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return weights.astype(x.dtype), experts

    def matrices(self) -> tuple[Weight, Weight]:
        """Returns gate and up side by side [x, d, 2, f], and down [x, f, d], of all experts.

        Int8 matrices have their inputs last: [x, 2, f, d] and [x, d, f].
        """
        if isinstance(self.experts, StackedExperts):
            return weight_of(self.experts.gate_up_proj), weight_of(self.experts.down_proj)

        def stack(*weights: Weight, axis: int = 0) -> Weight:
            return jax.tree.map(lambda *arrays: jnp.stack(arrays, axis), *weights)

        experts: list[Any] = list(self.experts)
        axis = 1 if experts[0].gate_proj.kernel_scale is None else 0
        gate_up = [stack(weight_of(e.gate_proj), weight_of(e.up_proj), axis=axis) for e in experts]
        return stack(*gate_up), stack(*(weight_of(expert.down_proj) for expert in experts))

    def _gathered(
        self, x: Float[Array, "n d"], weights: Float[Array, "n c"], experts: Int[Array, "n c"]
    ) -> Float[Array, "n d"]:
        """Runs few tokens: reads only the matrices of their experts."""
        gate_up, (down, scale) = jax.tree.map(lambda array: array[experts], self.matrices())
        hidden = self._gated(quantize.einsum("nd,ncdgf->ncgf", x, *gate_up))
        if scale is None:
            return jnp.einsum("ncf,ncfd,nc->nd", hidden, down, weights)
        left = quantize.einsum("ncf,ncfd->ncd", hidden, down, scale)
        return jnp.einsum("ncd,nc->nd", left, weights)

    def _dense(
        self, x: Float[Array, "n d"], weights: Float[Array, "n c"], experts: Int[Array, "n c"]
    ) -> Float[Array, "n d"]:
        """Runs many tokens, each through all experts, so that every matrix is read once, in place.

        Together the tokens need nearly every expert, and here arithmetic costs less than memory.
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
        # Each expert has its own scales, which must be applied before the sum over experts.
        return jnp.sum(quantize.einsum("xnf,xfd->xnd", hidden, down, scale[:, None]), axis=0)

    def _gated(self, gate_up: jax.Array) -> jax.Array:
        return self.activation(gate_up[..., 0, :]) * gate_up[..., 1, :]
