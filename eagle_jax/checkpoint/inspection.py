"""Describes a checkpoint: its kind, its sizes, and which optional parts it lacks."""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eagle_jax.checkpoint import hf
from eagle_jax.checkpoint.lazy_tensor import LazyTensor
from eagle_jax.checkpoint.names import TABLE
from eagle_jax.config import DraftConfig
from eagle_jax.drafters.files import DraftFiles


def describe(directory: Path, target: Path | None) -> dict[str, Any]:
    """Returns kind, family, sizes and missing parts of a directory; reads only headers of files.

    Args:
        directory: directory of a target or of a draft.
        target: directory of the draft's target, if it is known.

    Raises:
        ValueError: a file is missing or corrupt. A complete checkpoint that this library cannot run
            is still described, with the reason under "cannot be loaded".
    """
    spec, settings, tensors = hf.recognise(directory)
    own = spec.checkpoint()
    weights = {name: x for name, x in tensors.items() if x.dtype.kind not in "iub"}
    dtypes = collections.Counter(x.dtype.name for x in weights.values())
    about: dict[str, Any] = {
        "kind": "target" if own.whole else spec.kind,
        "family": settings.get("model_type", "none named"),
        "architectures": settings.get("architectures", []),
        "parameters": sum(math.prod(x.shape) for x in weights.values()),
        "bytes": sum(x.nbytes for x in tensors.values()),
        "tensors": len(tensors),
        "dtypes": dict(dtypes),
    }
    about |= {key: settings[key] for key in (*_SIZES, *own.size_keys) if key in settings}
    about["lacks"] = own.lacks(directory, settings, list(tensors))
    try:
        config = None if target is None else hf.open_target(target)[0]
        opened, params = hf.open_draft(directory, config)
        if config is not None and not own.whole:
            hf.check_fit(config, opened)
        about |= _opened(own, opened, params, settings)
    except ValueError as error:
        about["cannot be loaded"] = str(error)
    return about


_SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "target_hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "draft_vocab_size",
    "max_position_embeddings",
)


def _opened(
    own: DraftFiles,
    config: DraftConfig,
    params: Mapping[str, LazyTensor],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    about: dict[str, Any] = {}
    if not own.whole:
        about["parameters without embedding"] = sum(
            math.prod(x.shape)
            for name, x in params.items()
            if name not in (TABLE, "embed_tokens.embedding")
        )
    theta = getattr(config, "rope_theta", None)
    if theta is not None:
        about["rope_theta"] = theta
    return about | own.describe(config, settings)


def readable(found: Mapping[str, Any]) -> str:
    """Returns the descriptions of all parts as lines of text for users."""
    lines = []
    for part, about in found.items():
        if not isinstance(about, dict):
            lines.append(f"{part}: {about}")
            continue
        lines.append(f"{part}:" if part != "." else "checkpoint:")
        for key, value in about.items():
            if isinstance(value, int) and not isinstance(value, bool) and value >= 10**6:
                value = f"{value:,}"
            elif isinstance(value, dict):
                value = ", ".join(f"{name} ({count})" for name, count in value.items())
            elif isinstance(value, list):
                value = ", ".join(map(str, value)) or "nothing"
            lines.append(f"  {key}: {value}")
    return "\n".join(lines)
