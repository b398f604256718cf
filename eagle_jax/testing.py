"""Public fakes for tests and examples: tiny architectures with random or adversarial parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable

import jax
from flax import nnx

from eagle_jax.config import EagleConfig, TransformerConfig
from eagle_jax.models import EagleDraft, Transformer, init_params
from eagle_jax.params import Params
from eagle_jax.types import ParamDict


def tiny_target(vocab_size: int = 61, **changes: int | float | bool) -> TransformerConfig:
    """A two-layer target, every dimension different from every other."""
    config = TransformerConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        max_position_embeddings=256,
    )
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def tiny_draft(target: TransformerConfig, **changes: int | float | bool) -> EagleConfig:
    """A draft that fits `target`."""
    config = EagleConfig(
        vocab_size=target.vocab_size,
        hidden_size=target.hidden_size,
        intermediate_size=40,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def random_params(
    cls: type[nnx.Module], config: Hashable, seed: int, scale: float = 12.0
) -> ParamDict:
    """Every array random: matrices with standard deviation `scale / 50`, norms around one."""

    def draw(key: jax.Array, name: str, like: jax.Array) -> jax.Array:
        noise = jax.random.normal(key, like.shape)
        return 1 + 0.2 * noise if name.endswith("scale") else 0.02 * scale * noise

    shapes = init_params(cls, config, 0)
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {
        name: draw(key, name, shapes[name]) for key, name in zip(keys, sorted(shapes), strict=True)
    }


def tiny_params(
    target: TransformerConfig | None = None, seed: int = 0, scale: float = 12.0
) -> Params:
    """A random pair whose outputs depend on the whole context, the more sharply the larger `scale`.

    Not the initial weights of training, whose layers are the identity.
    """
    target = target or tiny_target()
    draft = tiny_draft(target)

    return Params(
        target=random_params(Transformer, target, seed, scale),
        draft=random_params(EagleDraft, draft, seed + 1, scale),
        target_config=target,
        draft_config=draft,
    )
