"""Medusa heads (arXiv 2401.10774 section 2.1), which predict several tokens from one feature.

Head i maps the target's feature at token t to a distribution of token t + 2 + i. It has residual
blocks `h + silu(W h + b)` and then a vocabulary head: its own, or a square matrix and the target's.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from eagle_jax.drafters.medusa.config import MedusaConfig
from eagle_jax.layout import PLAIN, Layout
from eagle_jax.models.linear import Linear
from eagle_jax.models.per_device import ROWS, per_device
from eagle_jax.models.transformer import Output, Transformer, vocabulary_head
from eagle_jax.types import Hidden


class ResidualBlock(nnx.Module):
    """Computes `h + silu(linear(h))`; it is initialised as the identity."""

    def __init__(self, width: int, **more: Any) -> None:
        self.linear = Linear(width, width, bias=True, zero=True, **more)

    def __call__(self, x: Hidden) -> Hidden:
        return x + jax.nn.silu(self.linear(x))


class MedusaHead(nnx.Module):
    """One head: residual blocks, then its vocabulary head, or a matrix before the target's head."""

    def __init__(self, config: MedusaConfig, layout: Layout = PLAIN, *, rngs: nnx.Rngs) -> None:
        d, v = config.hidden_size, config.vocab_size
        more: dict[str, Any] = {"quantization": layout.quantize, "rngs": rngs}
        self.blocks = nnx.List(ResidualBlock(d, **more) for _ in range(config.num_layers))
        tied = config.tie_lm_head
        self.lm_head = None if tied else Linear(d, v, **more)
        self.lm_proj = Linear(d, d, **more) if tied else None
        if self.lm_proj is not None and layout.quantize is None:
            self.lm_proj.kernel = nnx.Param(jnp.eye(d))  # training starts from the target's head

    def __call__(self, x: Hidden) -> Hidden:
        for block in self.blocks:
            x = block(x)
        return x if self.lm_proj is None else self.lm_proj(x)


class MedusaHeads(nnx.Module):
    """All Medusa heads, which read the same feature."""

    def __init__(self, config: MedusaConfig, layout: Layout = PLAIN, *, rngs: nnx.Rngs) -> None:
        self.heads = nnx.List(
            MedusaHead(config, layout, rngs=rngs) for _ in range(config.num_heads)
        )

    def __call__(self, features: Hidden) -> list[Hidden]:
        """Returns the input of each head's vocabulary matrix, [b, t, d] per head."""

        def run(own, features):
            return [head(features) for head in own["heads"]]

        return per_device(run, {"heads": self.heads}, (features,), (ROWS,))

    def features(self, output: Output) -> Hidden:
        """Returns the part of the target's output that the heads read: the features."""
        return output.features

    def logits(self, features: Hidden, target: Transformer) -> list[Float[Array, "b t v"]]:
        """Returns the float32 logits of every head."""
        scores = []
        for head, hidden in zip(self.heads, self(features), strict=True):
            if head.lm_head is None:
                scores.append(target.logits(hidden))
            else:
                scores.append(vocabulary_head(head.lm_head, hidden))
        return scores
