"""Rotary settings of `config.json`: base and scaling, with transformers' new and old keys."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

from eagle_jax.config import RopeScaling

SLIDING, FULL = "sliding_attention", "full_attention"

# The keys that each type of scaling reads, besides the base.
_ROPE_KEYS = {
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}


def to_json(config: Any, official: bool = False) -> dict[str, Any]:
    """Returns the rotary keys of `config.json`, for transformers 5 and for older readers.

    Args:
        config: configuration of a model with rotary embedding.
        official: write linear scaling in the form that the official EAGLE code reads.
    """
    scaling: RopeScaling | None = getattr(config, "rope_scaling", None)
    local: float | None = getattr(config, "rope_local_base_freq", None)
    rope: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None:
        own = dataclasses.asdict(scaling)
        read = _ROPE_KEYS[scaling.rope_type]
        rope = {name: own[name] for name in ("rope_type", *read) if own[name] is not None}
    # transformers 5 reads `rope_parameters`, older versions read the other keys.
    settings: dict[str, Any] = {"rope_parameters": rope | {"rope_theta": config.rope_theta}}
    if local is not None:
        sliding = {"rope_type": "default", "rope_theta": local}
        settings["rope_parameters"] = {FULL: settings["rope_parameters"], SLIDING: sliding}
    if official and rope["rope_type"] == "linear":
        rope = {"type": "linear", "factor": rope["factor"]}
    return settings if scaling is None else settings | {"rope_scaling": rope}


def _rope_parameters(settings: Mapping[str, Any], layers: str) -> Mapping[str, Any]:
    """Returns the rotary settings of the layers of one type, or of all layers if they agree."""
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"rope_parameters={rope!r}: must be an object")
    if FULL in rope or SLIDING in rope:
        rope = rope.get(layers) or {}
        if not isinstance(rope, Mapping):
            raise ValueError(f"rope_parameters.{layers}={rope!r}: must be an object")
        return _present(rope)
    # In older files of Gemma 3, scaling applies to the full-attention layers only.
    return _present(rope) if layers == FULL else {}


def _present(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings without the keys that are null, which means absent."""
    return {key: value for key, value in rope.items() if value is not None}


def _base(key: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"{key}={value!r}: must be a positive number")
    return float(value)


def from_json(
    fields: Collection[str], settings: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns `rope_theta` and, if `fields` contains it, `rope_scaling`.

    Raises:
        ValueError: a key is wrong, missing or not supported; the message names it.
    """
    rope = _rope_parameters(settings, FULL)
    default = settings.get("rope_theta", defaults.get("rope_theta", 10000.0))
    values: dict[str, Any] = {"rope_theta": _base("rope_theta", rope.get("rope_theta", default))}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    known = ("default", *_ROPE_KEYS) if "rope_scaling" in fields else ("default",)
    if rope_type not in known:
        names = ", ".join(repr(name) for name in known)
        raise ValueError(f"rope_type={rope_type!r} is not supported; only {names} is")
    if "rope_scaling" in fields:
        values["rope_scaling"] = (
            None if rope_type == "default" else _scaling(rope_type, rope, settings)
        )
    if rope.get("partial_rotary_factor", settings.get("partial_rotary_factor", 1)) != 1:
        raise ValueError("partial_rotary_factor: is not supported; only 1 is")
    return values


def _scaling(rope_type: str, rope: Mapping[str, Any], settings: Mapping[str, Any]) -> RopeScaling:
    found = {name: rope[name] for name in _ROPE_KEYS[rope_type] if rope.get(name) is not None}
    longest = settings.get("max_position_embeddings")
    if rope_type != "linear":
        # transformers' defaults for missing keys.
        outer = settings.get("original_max_position_embeddings", longest)
        original = found.setdefault("original_max_position_embeddings", outer)
        if rope_type == "yarn" and "factor" not in found and longest and original:
            found["factor"] = longest / original
    required = ("factor", "low_freq_factor", "high_freq_factor")
    for name in required[: 3 if rope_type == "llama3" else 1]:
        if name not in found:
            raise ValueError(f"rope_scaling: has no {name}, which {rope_type!r} needs; add it")
    floats = {f.name for f in dataclasses.fields(RopeScaling) if "float" in str(f.type)}
    # As floats, so that the 8 of a file and our 8.0 give identical configurations.
    numbers = {
        name: float(value) if name in floats and type(value) is int else value
        for name, value in found.items()
    }
    return RopeScaling(rope_type=rope_type, **numbers)  # pyright: ignore[reportArgumentType]


def local_base(settings: Mapping[str, Any], default: float) -> float:
    """Returns the separate rotary base of the sliding-window layers.

    Raises:
        ValueError: the base is not a positive number, or these layers have a rotary scaling.
    """
    rope = _rope_parameters(settings, SLIDING)
    rope_type = rope.get("rope_type", "default")
    if rope_type != "default":
        raise ValueError(
            f"rope_type={rope_type!r} is not supported in sliding layers; only 'default' is"
        )
    key = "rope_local_base_freq"
    return _base(key, rope.get("rope_theta", settings.get(key, default)))
