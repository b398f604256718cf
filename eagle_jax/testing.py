"""Public helpers for tests and examples: tiny architectures with random parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable

import jax
import jax.numpy as jnp
from flax import nnx

from eagle_jax.config import (
    DraftConfig,
    Eagle3Config,
    EagleConfig,
    MedusaConfig,
    TransformerConfig,
)
from eagle_jax.drafters import registry
from eagle_jax.drafters.draft_vocabulary import size_of
from eagle_jax.layout import PLAIN, Layout
from eagle_jax.models import Transformer, init_params
from eagle_jax.params import Draft, Params
from eagle_jax.types import ParamDict


def tiny_target(vocab_size: int = 61, **changes: int | float | bool) -> TransformerConfig:
    """Returns a two-layer target configuration in which all dimensions differ from each other."""
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
    """Returns an EAGLE-1 draft configuration that fits `target`."""
    config = EagleConfig(
        vocab_size=target.vocab_size,
        hidden_size=target.hidden_size,
        intermediate_size=40,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def tiny_eagle3(
    target: TransformerConfig, **changes: int | float | bool | tuple[int, ...]
) -> Eagle3Config:
    """Returns an EAGLE-3 draft configuration for `target`; it drafts two thirds of the tokens."""
    config = Eagle3Config(
        vocab_size=target.vocab_size,
        draft_vocab_size=max(1, target.vocab_size * 2 // 3),
        hidden_size=target.hidden_size,
        intermediate_size=40,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        aux_layers=(0, 1, 2),
    )
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def tiny_medusa(target: TransformerConfig, **changes: int | bool) -> MedusaConfig:
    """Returns a configuration of three Medusa heads that fit `target`."""
    config = MedusaConfig(target.vocab_size, target.hidden_size, num_heads=3)
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def tiny_model(target: TransformerConfig, **changes: int | float | bool) -> TransformerConfig:
    """Returns a one-layer model configuration with `target`'s vocabulary and another width."""
    smaller = {"hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 1, "head_dim": 6}
    return dataclasses.replace(target, **(smaller | changes))  # type: ignore[arg-type]


def random_draft(
    config: DraftConfig, seed: int, scale: float = 12.0, layout: Layout = PLAIN
) -> Draft:
    """Returns a draft with random arrays; a draft vocabulary lacks the target's first tokens."""
    module = registry.by_config(config).module_class()
    params = random_params(module, config, seed, scale, layout)
    if size := size_of(config):
        table = jnp.full(size, config.vocab_size - size, jnp.int32)
        params = {**params, "d2t": table}
    return Draft(params, config, layout)


def random_params(
    cls: Callable[..., nnx.Module],
    config: Hashable,
    seed: int,
    scale: float = 12.0,
    layout: Layout = PLAIN,
) -> ParamDict:
    """Returns random arrays: matrices with standard deviation `scale / 50`, norms around one."""

    def draw(key: jax.Array, name: str, like: jax.Array) -> jax.Array:
        noise = jax.random.normal(key, like.shape)
        return 1 + 0.2 * noise if name.endswith("scale") else 0.02 * scale * noise

    shapes = init_params(cls, config, 0, layout)
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {
        name: draw(key, name, shapes[name]) for key, name in zip(keys, sorted(shapes), strict=True)
    }


def tiny_params(
    target: TransformerConfig | None = None,
    seed: int = 0,
    scale: float = 12.0,
    layout: Layout = PLAIN,
) -> Params:
    """Returns a random target with a draft of every kind, all in the same layout.

    The larger `scale`, the more strongly the outputs depend on the context. Training starts from
    other weights, with layers that are the identity.
    """
    target = target or tiny_target()
    configs = (tiny_draft(target), tiny_eagle3(target), tiny_medusa(target), tiny_model(target))
    return Params(
        target=random_params(Transformer, target, seed, scale, layout),
        drafts={config.kind: random_draft(config, seed + 1, scale, layout) for config in configs},
        target_config=target,
        layout=layout,
    )
