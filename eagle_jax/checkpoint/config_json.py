"""Converts between `config.json` and the configurations of targets and drafts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from eagle_jax.checkpoint import rope
from eagle_jax.checkpoint.families import (
    COMMON,
    FAMILIES,
    LAYER,
    Family,
    after_max_window_layers,
    count,
)
from eagle_jax.config import TransformerConfig
from eagle_jax.settings import check

T = TypeVar("T")

# For these keys, null has another meaning than absence.
_NULLABLE = {
    "sliding_window",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "head_dim",
    "num_key_value_heads",
}

# transformers' defaults for keys that a text_config leaves out (others are in `families`).
_GEMMA3_TEXT = {"vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4}
_GEMMA3_NAMES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
    "lm_head.": "lm_head.",
}


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `config.json` with the keys of speculators' nested layer moved to the top level."""
    nested = settings.get("transformer_layer_config")
    if not isinstance(nested, Mapping):
        return dict(settings)
    nested = {key: value for key, value in nested.items() if value is not None}
    # vLLM assumes true if such a file lacks the key.
    own = {key: value for key, value in settings.items() if key not in ("model_type",)}
    return {"norm_before_residual": True, **nested, **own}


def text_part(
    settings: Mapping[str, Any], tensors: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns settings and tensors of a multimodal model's language model (Gemma 3 from 4B on).

    For any other model it returns all of them.
    """
    text = settings.get("text_config")
    if settings.get("model_type") != "gemma3" or not isinstance(text, Mapping):
        return dict(settings), dict(tensors)
    above = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype")
    kept = {key: settings[key] for key in above if key in settings}
    own = {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
    found = {
        new + name.removeprefix(old): tensor
        for name, tensor in tensors.items()
        for old, new in _GEMMA3_NAMES.items()
        if name.startswith(old)
    }
    return {**_GEMMA3_TEXT, **kept, **text, **own}, found


def to_json(config: TransformerConfig, model_type: str, dtype: str) -> dict[str, Any]:
    """Returns the keys that describe a target's layers, including its family's own keys."""
    family = FAMILIES[model_type]
    return {
        **_layer_json(config, family, model_type, dtype),
        **rope.to_json(config),
        **{key: getattr(config, name) for name, key in family.keys.items()},
        **family.extra,
        **_layers_json(config, family),
    }


def draft_json(config: Any, dtype: str) -> dict[str, Any]:
    """Returns the keys of a draft with a Llama layer, as the official code reads them."""
    return {
        **_layer_json(config, FAMILIES["llama"], "llama", dtype),
        **rope.to_json(config, official=True),
    }


def _layer_json(config: Any, family: Family, model_type: str, dtype: str) -> dict[str, Any]:
    return {
        "architectures": [family.architecture],
        "model_type": model_type,
        "hidden_act": family.flags.get("hidden_act", "silu"),
        **{name: getattr(config, name) for name in sorted(LAYER)},
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def _layers_json(config: TransformerConfig, family: Family) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    if family.switch:
        settings["use_sliding_window"] = config.sliding_window is not None
    if "layer_types" in family.keys:
        windows = [config.window(layer) for layer in range(config.num_hidden_layers)]
        types = [rope.FULL if window is None else rope.SLIDING for window in windows]
        settings["layer_types"] = types
        if family.windows is after_max_window_layers:
            first = types.index(rope.SLIDING) if rope.SLIDING in types else len(types)
            settings["max_window_layers"] = first
    if config.num_experts and "mlp_only_layers" in family.keys:
        settings["mlp_only_layers"] = list(config.mlp_only_layers)
    if "moe_intermediate_size" in family.keys:
        width = config.moe_intermediate_size or config.intermediate_size
        settings["moe_intermediate_size"] = width
    if "query_pre_attn_scalar" in family.keys:
        settings["query_pre_attn_scalar"] = config.query_pre_attn_scalar or config.head_dim
    return settings


def from_json(directory: Path, settings: Mapping[str, Any]) -> TransformerConfig:
    """Returns the configuration of a whole transformer from the keys of its `config.json`.

    Raises:
        ValueError: a key is missing, wrong or not supported; the message names file and key.
    """
    family = _family(directory / "config.json", settings)
    keys = {**_null_keys(directory / "config.json"), **settings}
    return build(directory, TransformerConfig, lambda: _target_values(keys, family))


def draft_from_json(directory: Path, kind: type[T], settings: Mapping[str, Any]) -> T:
    """Returns a draft's configuration of type `kind`; its layer has the keys of a target's layers.

    In official heads the key `qkv_bias` alone decides about biases, whatever their family.

    Raises:
        ValueError: as in `from_json`.
    """
    family = _family(directory / "config.json", settings)
    keys = {**_null_keys(directory / "config.json"), **settings}
    return build(directory, kind, lambda: _draft_values(kind, keys, family))


def build(directory: Path, kind: type[T], values: Callable[[], Mapping[str, Any]]) -> T:
    """Returns `kind(**values())`; an error's message begins with the file's name."""
    try:
        config = kind(**values())
        check(config)
        layer = getattr(config, "layer", None)
        if layer is not None:
            layer()  # checks the layer's sizes
        epsilon = getattr(config, "rms_norm_eps", 0.0)
        if epsilon < 0:
            raise ValueError(f"rms_norm_eps={epsilon}: must be 0 or more")
        return config
    except ValueError as error:
        raise ValueError(f"{directory / 'config.json'}: {error}") from error


def check_fixed(path: Path, settings: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Raises ValueError for a key whose value asks for a computation that is not supported."""
    for key, value in fixed.items():
        if settings.get(key, value) != value:
            raise ValueError(
                f"{path}: {key}={settings[key]!r} is not supported; only {value!r} is: "
                "give a model that was trained so"
            )


def _null_keys(path: Path) -> dict[str, None]:
    """Returns the keys that the file sets to null although null is not absence for them."""
    if not path.is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    return {key: None for key in _NULLABLE if key in found and found[key] is None}


def _family(path: Path, settings: Mapping[str, Any]) -> Family:
    model_type = settings.get("model_type", "llama")  # the oldest heads have no model_type
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"{path}: model_type={model_type!r} is not supported; known: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[model_type]
    check_fixed(path, settings, family.fixed)
    return family


def _target_values(settings: Mapping[str, Any], family: Family) -> dict[str, Any]:
    fields = {field.name: field for field in dataclasses.fields(TransformerConfig)}
    values: dict[str, Any] = {
        "attention_bias": family.flags.get("attention_bias", False),
        **rope.from_json(fields, settings, family.defaults),
        **family.flags,
        **_family_values(settings, family),
    }
    # Fields of other families keep their defaults, whatever the file contains.
    own = [field for field in fields.values() if field.name in COMMON]
    return _with_keys(values, own, settings, family)


def _draft_values(kind: type, settings: Mapping[str, Any], family: Family) -> dict[str, Any]:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    values = {
        "attention_bias": settings.get("qkv_bias", False),
        **rope.from_json(fields, settings, family.defaults),
    }
    _check_unused(settings)
    return _with_keys(values, fields.values(), settings, family)


def _with_keys(
    values: dict[str, Any],
    fields: Iterable[dataclasses.Field[Any]],
    settings: Mapping[str, Any],
    family: Family,
) -> dict[str, Any]:
    """Returns `values` together with the other fields that have a key in `settings`."""
    for field in fields:
        value = settings.get(field.name, family.defaults.get(field.name))
        if value is None:
            value = _derived(field.name, settings)
        if value is not None:
            values.setdefault(field.name, value)
        elif field.name not in values and field.default is dataclasses.MISSING:
            raise ValueError(f"has no {field.name}; add it")
    return values


def _check_unused(settings: Mapping[str, Any]) -> None:
    """Raises ValueError if a key that drafts have but do not use has a value of the wrong type."""
    for key, kind in (("max_position_embeddings", int), ("tie_word_embeddings", bool)):
        value = settings.get(key, kind(1))
        if type(value) is not kind or value < 0:
            raise ValueError(f"{key}={value!r}: must be {kind.__name__}")


def _family_values(settings: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Returns the fields of `TransformerConfig` for which this family has keys."""
    aliases = {key: settings[other] for key, other in family.aliases.items() if other in settings}
    found = {**family.defaults, **aliases, **settings}
    values = {name: found.get(key) for name, key in family.keys.items()}
    values |= _layer_types(settings, family, values)
    if "rope_local_base_freq" in values:
        default = family.defaults["rope_local_base_freq"]
        values["rope_local_base_freq"] = rope.local_base(settings, default)
    if "mlp_only_layers" in values:
        values["mlp_only_layers"] = _mlp_only_layers(settings)
    return values


def _layer_types(
    settings: Mapping[str, Any], family: Family, values: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns window and layer types in a canonical form, since several forms are equivalent."""
    window, layers = values.get("sliding_window"), settings.get("num_hidden_layers")
    if window is None or (family.switch and not settings.get("use_sliding_window", False)):
        return {"sliding_window": None, "layer_types": ()}
    if family.windows is None or not isinstance(layers, int):
        return {"sliding_window": window, "layer_types": ()}
    types = settings.get("layer_types")
    if types is None:
        slides = family.windows
        types = [rope.SLIDING if slides(settings, layer) else rope.FULL for layer in range(layers)]
    if not isinstance(types, list):
        raise ValueError(f"layer_types={types!r}: must be a list with one entry per layer")
    if all(entry == rope.FULL for entry in types):
        return {"sliding_window": None, "layer_types": ()}
    if all(entry == rope.SLIDING for entry in types):
        types = []
    return {"sliding_window": window, "layer_types": tuple(types)}


def _mlp_only_layers(settings: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns the layers without experts: those listed, and those `decoder_sparse_step` skips."""
    step, layers = settings.get("decoder_sparse_step", 1), count(settings, "num_hidden_layers", 0)
    listed = settings.get("mlp_only_layers", ())
    if not isinstance(listed, list | tuple) or any(type(layer) is not int for layer in listed):
        raise ValueError(f"mlp_only_layers={listed!r}: must be a list of layer numbers")
    if type(step) is not int or step < 1:
        raise ValueError(f"decoder_sparse_step={step!r}: must be a positive number of layers")
    return tuple(i for i in range(layers) if i in listed or (i + 1) % step)


def _derived(name: str, settings: Mapping[str, Any]) -> int | None:
    """Returns a key that older `config.json` files leave out, by transformers' rule."""
    heads, width = settings.get("num_attention_heads"), settings.get("hidden_size")
    if name == "num_key_value_heads":
        return heads
    if name != "head_dim" or heads is None or width is None:
        return None
    for key, value in (("hidden_size", width), ("num_attention_heads", heads)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{key}={value!r}: must be a whole number, at least 1")
    return width // heads
