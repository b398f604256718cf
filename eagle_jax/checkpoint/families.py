"""`config.json` <-> configurations: what each model type of Hugging Face implies, as a table."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from eagle_jax.checkpoint import rope
from eagle_jax.config import TransformerConfig
from eagle_jax.settings import check

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Family:
    """What one `model_type` of `config.json` implies.

    Attributes:
        architecture: the class in transformers.
        flags: fields of `TransformerConfig` that the family has in this way, and no key for.
        keys: further fields that it may have, by their keys in `config.json`; all other families'
            fields must have their defaults.
        defaults: for keys that `config.json` may leave out.
        fixed: keys that must be absent, null or have this value: others change the computation.
        extra: keys that are written besides.
        windows: the rule for layers that slide where `layer_types` is absent: a function of the
            keys and the number of a layer. Without one, all layers slide.
        aliases: keys that some writers call otherwise.
        switch: `sliding_window` counts only where `use_sliding_window` is true.
        renames: parts of our tensors' names, and what they are called on disk.
    """

    architecture: str
    flags: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    windows: Callable[[Mapping[str, Any], int], bool] | None = None
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    switch: bool = False
    renames: Mapping[str, str] = dataclasses.field(default_factory=dict)


def _after_max_window_layers(settings: Mapping[str, Any], layer: int) -> bool:
    return layer >= _count(settings, "max_window_layers", 28)


def _every_other(settings: Mapping[str, Any], layer: int) -> bool:
    del settings
    return layer % 2 == 0


def _all_but_every_sixth(settings: Mapping[str, Any], layer: int) -> bool:
    pattern = _count(settings, "sliding_window_pattern", 6)
    if pattern < 1:
        raise ValueError(f"sliding_window_pattern={pattern}: must be at least 1")
    return (layer + 1) % pattern != 0


def _count(settings: Mapping[str, Any], key: str, default: int) -> int:
    value = settings.get(key, default)
    if type(value) is not int or value < 0:
        raise ValueError(f"{key}={value!r}: must be a number of layers")
    return value


_SILU = {"hidden_act": "silu"}
_WINDOW = {"sliding_window": "sliding_window"}
_WINDOWS = _WINDOW | {"layer_types": "layer_types"}
_QWEN_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
}
_GEMMA = {
    "hidden_act": "gelu_pytorch_tanh",
    "post_norms": True,
    "unit_offset_norm": True,
    "scale_embeddings": True,
}
_GEMMA_KEYS = _WINDOWS | {
    "query_pre_attn_scalar": "query_pre_attn_scalar",
    "final_logit_softcapping": "final_logit_softcapping",
}
_GEMMA_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
_GEMMA_FIXED = {
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "use_bidirectional_attention": False,
}

FAMILIES = {
    # Vicuna and every Llama.
    "llama": Family(
        architecture="LlamaForCausalLM",
        defaults={"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
        # transformers' `attention_bias` for Llama also puts one on o_proj, which we don't have.
        fixed=_SILU | {"attention_bias": False, "mlp_bias": False},
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        keys=_WINDOW,
        defaults={
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
        },
        fixed=_SILU,
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        flags={"attention_bias": True},
        keys=_WINDOWS,
        defaults=_QWEN_DEFAULTS,
        fixed=_SILU,
        windows=_after_max_window_layers,
        switch=True,
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        flags={"qk_norm": True},
        keys=_WINDOWS,
        defaults=_QWEN_DEFAULTS | {"head_dim": 128},
        fixed=_SILU | {"attention_bias": False},
        windows=_after_max_window_layers,
        switch=True,
    ),
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        flags={"norm_topk_prob": True},
        keys=_WINDOW
        | {"num_experts": "num_local_experts", "num_experts_per_tok": "num_experts_per_tok"},
        defaults={
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "rope_theta": 1e6,
        },
        fixed=_SILU,
        # It has an expert's matrices by number: w1(x) is gated, times w3(x), then w2.
        renames={
            ".mlp.": ".block_sparse_moe.",
            ".gate_proj.": ".w1.",
            ".down_proj.": ".w2.",
            ".up_proj.": ".w3.",
        },
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        flags={"qk_norm": True},
        keys=_WINDOW
        | {
            "num_experts": "num_experts",
            "num_experts_per_tok": "num_experts_per_tok",
            "moe_intermediate_size": "moe_intermediate_size",
            "norm_topk_prob": "norm_topk_prob",
            "mlp_only_layers": "mlp_only_layers",
        },
        defaults=_QWEN_DEFAULTS
        | {
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
        },
        fixed=_SILU | {"attention_bias": False},
        extra={"decoder_sparse_step": 1},
        aliases={"num_experts": "num_local_experts"},  # as transformers 5 writes it
        switch=True,
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        flags=_GEMMA,
        keys=_GEMMA_KEYS | {"attn_logit_softcapping": "attn_logit_softcapping"},
        defaults=_GEMMA_DEFAULTS
        | {
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        fixed=_GEMMA_FIXED,
        extra={"hidden_activation": "gelu_pytorch_tanh"},
        windows=_every_other,
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        flags=_GEMMA | {"qk_norm": True},
        keys=_GEMMA_KEYS | {"rope_local_base_freq": "rope_local_base_freq"},
        defaults=_GEMMA_DEFAULTS
        | {
            "max_position_embeddings": 131072,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
        },
        # transformers has the key and reads it nowhere.
        fixed=_GEMMA_FIXED | {"attn_logit_softcapping": None},
        extra={"hidden_activation": "gelu_pytorch_tanh"},
        windows=_all_but_every_sixth,
    ),
}
"""Every `model_type` that can be read."""

# What a decoder layer is made of, under the same key in every family and for drafts of one layer.
_LAYER = {
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_theta",
    "vocab_size",
}
# Fields that every family has.
_COMMON = _LAYER | {"rope_scaling", "num_hidden_layers", "max_position_embeddings"}
_COMMON |= {"tie_word_embeddings", "model_type"}
# Null says something else for these than absence.
_NULLABLE = {
    "sliding_window",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "head_dim",
    "num_key_value_heads",
}


# What a text_config leaves out that is as transformers has it (the rest is in the table).
_GEMMA3_TEXT = {"vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4}
_GEMMA3_NAMES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
    "lm_head.": "lm_head.",
}


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` with the nested layer of speculators' files beside the other keys."""
    nested = settings.get("transformer_layer_config")
    if not isinstance(nested, Mapping):
        return dict(settings)
    nested = {key: value for key, value in nested.items() if value is not None}
    # vLLM takes true where such a file has no word on it.
    own = {key: value for key, value in settings.items() if key not in ("model_type",)}
    return {"norm_before_residual": True, **nested, **own}


def text_part(
    settings: Mapping[str, Any], tensors: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and tensors of the language model, where images are read too (Gemma 3 from 4B on).

    Of any other model, all.
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


def family_of(config: TransformerConfig) -> str:
    """The model type that has everything `config` asks for: its own, or else the first that fits.

    Raises:
        ValueError: none has; names what the closest lacks.
    """
    own = [config.model_type] if config.model_type in FAMILIES else []
    unmet = {name: _unmet(config, FAMILIES[name]) for name in [*own, *FAMILIES]}
    name = min(unmet, key=lambda name: len(unmet[name]))
    if unmet[name]:
        field = unmet[name][0]
        raise ValueError(
            f"{field}={getattr(config, field)!r}: no model type has this together with the other "
            f"settings (closest: {name!r}); known: {', '.join(FAMILIES)}"
        )
    return name


def _unmet(config: TransformerConfig, family: Family) -> list[str]:
    """Fields whose values `config.json` of this family cannot say."""
    unmet = []
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        if name in _COMMON or name in family.keys:
            continue
        if name == "norm_topk_prob" and not config.num_experts:
            continue  # nothing to normalise
        if value != family.flags.get(name, field.default):
            unmet.append(name)
    if ("num_experts" in family.keys) != (config.num_experts > 0):
        unmet.append("num_experts")
    if "rope_local_base_freq" in family.keys and config.rope_local_base_freq is None:
        unmet.append("rope_local_base_freq")
    return unmet


def to_json(config: TransformerConfig, model_type: str, dtype: str) -> dict[str, Any]:
    """The keys that describe a target's layers, those of its family among them."""
    family = FAMILIES[model_type]
    return {
        **_layer_json(config, family, model_type, dtype),
        **rope.to_json(config),
        **{key: getattr(config, name) for name, key in family.keys.items()},
        **family.extra,
        **_layers_json(config, family),
    }


def draft_json(config: Any, dtype: str) -> dict[str, Any]:
    """The keys of a draft whose layer is a Llama's, as the code of official heads reads them."""
    return {
        **_layer_json(config, FAMILIES["llama"], "llama", dtype),
        **rope.to_json(config, official=True),
    }


def _layer_json(config: Any, family: Family, model_type: str, dtype: str) -> dict[str, Any]:
    return {
        "architectures": [family.architecture],
        "model_type": model_type,
        "hidden_act": family.flags.get("hidden_act", "silu"),
        **{name: getattr(config, name) for name in sorted(_LAYER)},
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
        if family.windows is _after_max_window_layers:
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
    """The configuration of a whole transformer from the keys of `directory`'s `config.json`.

    Raises:
        ValueError: names the file, and the key that is missing, wrong or not supported.
    """
    family = _family(directory / "config.json", settings)
    keys = {**_null_keys(directory / "config.json"), **settings}
    return build(directory, TransformerConfig, lambda: _target_values(keys, family))


def draft_from_json(directory: Path, kind: type[T], settings: Mapping[str, Any]) -> T:
    """A draft's configuration of type `kind`, whose layer is described as a target's layers are.

    Official heads say `qkv_bias` and have no biases without it, whatever their family.

    Raises:
        ValueError: as in `from_json`.
    """
    family = _family(directory / "config.json", settings)
    keys = {**_null_keys(directory / "config.json"), **settings}
    return build(directory, kind, lambda: _draft_values(kind, keys, family))


def build(directory: Path, kind: type[T], values: Callable[[], Mapping[str, Any]]) -> T:
    """`kind(**values())`, with the file's name before the message of an error."""
    try:
        config = kind(**values())
        check(config)
        layer = getattr(config, "layer", None)
        if layer is not None:
            layer()  # checks its sizes
        epsilon = getattr(config, "rms_norm_eps", 0.0)
        if epsilon < 0:
            raise ValueError(f"rms_norm_eps={epsilon}: must be 0 or more")
        return config
    except ValueError as error:
        raise ValueError(f"{directory / 'config.json'}: {error}") from error


def check_fixed(path: Path, settings: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Refuses keys with values that change the computation to one we don't have."""
    for key, value in fixed.items():
        if settings.get(key, value) != value:
            raise ValueError(
                f"{path}: {key}={settings[key]!r} is not supported; only {value!r} is: "
                "give a model that was trained so"
            )


def _null_keys(path: Path) -> dict[str, None]:
    """Keys that the file sets to null and for which this is no absence; `settings` lack them."""
    if not path.is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    return {key: None for key in _NULLABLE if key in found and found[key] is None}


def _family(path: Path, settings: Mapping[str, Any]) -> Family:
    model_type = settings.get("model_type", "llama")  # the oldest heads name none
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
    # Other families' fields have their defaults, whatever a file says.
    own = [field for field in fields.values() if field.name in _COMMON]
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
    """`values` and, of the other fields, what their keys say."""
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
    """Keys that drafts have for others."""
    for key, kind in (("max_position_embeddings", int), ("tie_word_embeddings", bool)):
        value = settings.get(key, kind(1))
        if type(value) is not kind or value < 0:
            raise ValueError(f"{key}={value!r}: must be {kind.__name__}")


def _family_values(settings: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The fields of `TransformerConfig` that this family has keys for."""
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
    """Window and layer types, in one form where several would say the same."""
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
    """Layers without experts: the listed ones, and those that `decoder_sparse_step` leaves out."""
    step, layers = settings.get("decoder_sparse_step", 1), _count(settings, "num_hidden_layers", 0)
    listed = settings.get("mlp_only_layers", ())
    if not isinstance(listed, list | tuple) or any(type(layer) is not int for layer in listed):
        raise ValueError(f"mlp_only_layers={listed!r}: must be a list of layer numbers")
    if type(step) is not int or step < 1:
        raise ValueError(f"decoder_sparse_step={step!r}: must be a positive number of layers")
    return tuple(i for i in range(layers) if i in listed or (i + 1) % step)


def _derived(name: str, settings: Mapping[str, Any]) -> int | None:
    """transformers' rule for keys that older `config.json` files leave out."""
    heads, width = settings.get("num_attention_heads"), settings.get("hidden_size")
    if name == "num_key_value_heads":
        return heads
    if name != "head_dim" or heads is None or width is None:
        return None
    for key, value in (("hidden_size", width), ("num_attention_heads", heads)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{key}={value!r}: must be a whole number, at least 1")
    return width // heads
