"""Gives objectives the frozen target's features and embedding.

Features are either computed by a pass over the batch (online), or read from the batch. Stored
features were written by `eagle_jax.train.features`, which uses the same function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from eagle_jax.config import DraftObjective, TransformerConfig
from eagle_jax.models import Transformer, bind
from eagle_jax.models.attention import AttentionKernel
from eagle_jax.models.linear import Embedding
from eagle_jax.models.transformer import embedding as _embedding
from eagle_jax.models.transformer import packed_mask
from eagle_jax.train.objectives.base import Batch, transformer_flops
from eagle_jax.types import Hidden, ParamDict

# The only weights needed of a target whose features are stored.
ENDS = ("embed_tokens.embedding", "norm.scale", "lm_head.kernel")
_LARGEST = 127  # the int8 range used is symmetric: -127 to 127


def layers(settings: DraftObjective) -> tuple[int, ...]:
    """Returns the residual streams that a draft reads besides the features after the final norm."""
    return getattr(settings.draft, "aux_layers", ())


def ends(frozen: Mapping[str, Any]) -> ParamDict:
    """Returns those of the `ENDS` weights that the target has, as JAX arrays."""
    return {name: jnp.asarray(frozen[name]) for name in ENDS if name in frozen}


def features(
    config: TransformerConfig,
    layers: Sequence[int],
    frozen: ParamDict,
    batch: Batch,
    kernel: AttentionKernel,
) -> tuple[Hidden, ...]:
    """Returns the residual streams that enter `layers`, then the features after the final norm.

    Args:
        config, frozen: configuration and weights of the target; stored features need only `ENDS`.
        layers: layer numbers, as in `Eagle3Config.aux_layers`.
        batch: a packed batch; stored features, if any, are those of `layers`, in order.
        kernel: the attention kernel.
    """
    if "features" in batch:
        return _expand(batch, frozen[ENDS[0]].dtype)
    target = bind(Transformer, config, frozen)
    mask = packed_mask(batch["segment_ids"])
    output = target(batch["tokens"], batch["positions"], mask, kernel=kernel)
    return (*(output.residuals[i] for i in layers), output.features)


def compress(streams: Sequence[Hidden], dtype: str) -> Batch:
    """Returns the `n` arrays of `features` stacked in one array and rounded to `dtype`.

    Args:
        streams: as `features` returns them.
        dtype: "bfloat16", or "int8" with a scale for every token and stream.

    Returns:
        `features` [b, t, n, d]; for int8 also `scales` float32 [b, t, n].
    """
    joined = jnp.stack(streams, axis=2)
    if dtype == "bfloat16":
        return {"features": joined.astype(jnp.bfloat16)}
    joined = joined.astype(jnp.float32)
    scales = jnp.max(jnp.abs(joined), axis=-1) / _LARGEST
    steps = joined / jnp.maximum(scales, jnp.finfo(jnp.float32).tiny)[..., None]
    return {"features": jnp.round(steps).astype(jnp.int8), "scales": scales}


def _expand(batch: Batch, dtype: jnp.dtype) -> tuple[Hidden, ...]:
    stored = batch["features"]
    if "scales" in batch:
        stored = stored.astype(jnp.float32) * batch["scales"][..., None]
    stored = stored.astype(dtype)
    return tuple(stored[:, :, i] for i in range(stored.shape[2]))


def embedding(config: TransformerConfig, frozen: ParamDict) -> Embedding:
    """Returns the target's embedding as a module."""
    return bind(_embedding, config, {"embedding": frozen[ENDS[0]]})


def flops(
    settings: DraftObjective, config: TransformerConfig, sequence_length: int
) -> tuple[float, float]:
    """Returns `transformer_flops` of the target; stored features make its layers cost 0."""
    body, head = transformer_flops(config, sequence_length)
    return (0.0 if settings.features else body), head
