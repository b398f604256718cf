"""`config.json` <-> configurations: what each model type of Hugging Face implies."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from eagle_jax.config import Eagle3Config, EagleConfig, TransformerConfig
from eagle_jax.settings import check

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Family:
    """What one `model_type` of `config.json` implies.

    Attributes:
        architecture: the class in transformers.
        attention_bias: biases on q, k and v.
        defaults: for keys that `config.json` may leave out.
        fixed: keys that must be absent, null or have this value: others change the computation.
    """

    architecture: str
    attention_bias: bool
    defaults: Mapping[str, Any]
    fixed: Mapping[str, Any]


FAMILIES = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        attention_bias=False,
        defaults={"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
        # transformers' `attention_bias` for Llama also puts one on o_proj, which we don't have.
        fixed={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        attention_bias=True,
        defaults={"rms_norm_eps": 1e-6, "max_position_embeddings": 32768},
        fixed={"hidden_act": "silu", "use_sliding_window": False},
    ),
}
"""Every `model_type` that can be read."""


def to_json(
    config: TransformerConfig | EagleConfig | Eagle3Config, model_type: str, dtype: str
) -> dict[str, Any]:
    """The keys that targets and EAGLE drafts have in common."""
    shared = {field.name for field in dataclasses.fields(TransformerConfig)}
    shared &= {field.name for field in dataclasses.fields(EagleConfig)}
    # The model type says the first; the second is a layout in memory.
    shared -= {"attention_bias", "fused_mlp"}
    return {
        "architectures": [FAMILIES[model_type].architecture],
        "model_type": model_type,
        "hidden_act": "silu",
        **{name: getattr(config, name) for name in sorted(shared)},
        # transformers 5 reads `rope_parameters` and `dtype`, older ones the other two.
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def from_json(directory: Path, kind: type[T], settings: Mapping[str, Any]) -> T:
    """A configuration of type `kind` from the keys of `directory`'s `config.json`.

    Raises:
        ValueError: names the file, and the key that is missing, wrong or not supported.
    """
    path = directory / "config.json"
    family = _family(path, settings)
    return build(directory, kind, lambda: _values(kind, settings, family))


def build(directory: Path, kind: type[T], values: Callable[[], Mapping[str, Any]]) -> T:
    """`kind(**values())`, with the file's name before the message of an error."""
    try:
        config = kind(**values())
        check(config)
        return config
    except ValueError as error:
        raise ValueError(f"{directory / 'config.json'}: {error}") from error


def check_fixed(path: Path, settings: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Refuses keys with values that change the computation to one we don't have."""
    for key, value in fixed.items():
        if settings.get(key, value) != value:
            raise ValueError(f"{path}: {key}={settings[key]!r} is not supported; only {value!r} is")


def _family(path: Path, settings: Mapping[str, Any]) -> Family:
    model_type = settings.get("model_type", "llama")  # the oldest heads name none
    if model_type not in FAMILIES:
        raise ValueError(
            f"{path}: model_type={model_type!r} is not supported; known: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[model_type]
    check_fixed(path, settings, family.fixed)
    return family


def _values(kind: type, settings: Mapping[str, Any], family: Family) -> dict[str, Any]:
    values: dict[str, Any] = {
        "attention_bias": _attention_bias(kind, settings, family),
        "rope_theta": _rope_theta(settings),
        "fused_mlp": False,  # a layout in memory, whatever a file says
    }
    for field in dataclasses.fields(kind):
        value = settings.get(field.name, family.defaults.get(field.name))
        if value is None:
            value = _derived(field.name, settings)
        if value is not None:
            values.setdefault(field.name, value)
        elif field.name not in values and field.default is dataclasses.MISSING:
            raise ValueError(f"has no {field.name}; add it")
    return values


def _attention_bias(kind: type, settings: Mapping[str, Any], family: Family) -> bool:
    """Official heads say `qkv_bias` and have no biases without it, whatever their family."""
    return family.attention_bias if kind is TransformerConfig else settings.get("qkv_bias", False)


def _derived(name: str, settings: Mapping[str, Any]) -> int | None:
    """transformers' rule for keys that older `config.json` files leave out."""
    heads, width = settings.get("num_attention_heads"), settings.get("hidden_size")
    if name == "num_key_value_heads":
        return heads
    if name == "head_dim" and isinstance(heads, int) and isinstance(width, int) and heads > 0:
        return width // heads
    return None


def _rope_theta(settings: Mapping[str, Any]) -> float:
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise ValueError(f"rope_type={rope_type!r} is not supported; only 'default' is")
    return float(rope.get("rope_theta", settings.get("rope_theta", 10000.0)))
