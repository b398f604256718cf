"""Hugging Face directories (`config.json`, `model.safetensors`) <-> configuration, parameters.

In memory, parameters are a flat dictionary of Flax names: `layers.0.mlp.up_proj.kernel`, laid out
`[in, out]`. On disk a kernel is called `weight` and is transposed. Names of a target have the
prefix `model.`, those of an EAGLE-1 draft have none, as in the official heads.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eagle_jax.checkpoint import safetensors
from eagle_jax.config import EagleConfig, TransformerConfig, check

Params = dict[str, np.ndarray]
Shape = tuple[int, ...]


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

LEAVES = {
    "kernel": ("weight", True),
    "embedding": ("weight", False),
    "scale": ("weight", False),
    "bias": ("bias", False),
}
"""Flax leaf -> its name on disk, and whether it is transposed there."""

DTYPES = ("float32", "bfloat16", "float16")


def shapes(config: TransformerConfig | EagleConfig) -> dict[str, Shape]:
    """The name and the shape of every parameter that a configuration implies."""
    d, v = config.hidden_size, config.vocab_size
    if isinstance(config, EagleConfig):
        fc: dict[str, Shape] = {"fc.kernel": (2 * d, d)}
        if config.bias:
            fc["fc.bias"] = (d,)
        layer = _layer_shapes(config, "layers.0.")
        del layer["layers.0.input_layernorm.scale"]  # the features come in as they are
        return fc | layer
    result: dict[str, Shape] = {"embed_tokens.embedding": (v, d)}
    for index in range(config.num_hidden_layers):
        result |= _layer_shapes(config, f"layers.{index}.")
    result["norm.scale"] = (d,)
    if not config.tie_word_embeddings:
        result["lm_head.kernel"] = (d, v)
    return result


def save_target(
    directory: str | Path,
    config: TransformerConfig,
    params: Mapping[str, Any],
    dtype: str = "bfloat16",
    *,
    bos_token_id: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
) -> None:
    """Writes a directory that `transformers.AutoModelForCausalLM.from_pretrained` opens.

    Args:
        directory: created if missing.
        config: of the target.
        params: arrays with the names and shapes of `shapes(config)`.
        dtype: of the weights on disk, one of `DTYPES`.
        bos_token_id: begins a text, or none.
        eos_token_id: ends a text, one or several, or none.

    Raises:
        ValueError: `params` don't match `config`, or an unknown dtype.
    """
    family = "qwen2" if config.attention_bias else "llama"
    settings = _common_json(config, family, dtype) | {
        "num_hidden_layers": config.num_hidden_layers,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        # Written even when null: transformers would otherwise take Llama-2's 1 and 2.
        "bos_token_id": bos_token_id,
        "eos_token_id": list(eos_token_id) if isinstance(eos_token_id, Sequence) else eos_token_id,
    }
    _save(Path(directory), config, params, dtype, settings)


def load_target(directory: str | Path) -> tuple[TransformerConfig, Params]:
    """Reads a target; weights keep their dtype. Sharded directories can be read too.

    Raises:
        ValueError: a file is missing or corrupt, the model type or one of its settings is not
            supported, or a tensor is missing, unexpected or of a wrong shape.
    """
    directory = Path(directory)
    settings, family = _read_config(directory)
    config = _build(directory, TransformerConfig, settings, family)
    ignored = {"lm_head.weight"} if config.tie_word_embeddings else set()
    return config, _load(directory, config, ignored)


def save_draft(
    directory: str | Path, config: EagleConfig, params: Mapping[str, Any], dtype: str = "bfloat16"
) -> None:
    """Writes an EAGLE-1 draft in the layout of the official heads, without the embedding.

    Args and errors are as in `save_target`.
    """
    settings = _common_json(config, "llama", dtype) | {
        "num_hidden_layers": 1,
        "bias": config.bias,
        "qkv_bias": config.attention_bias,
    }
    _save(Path(directory), config, params, dtype, settings)


def load_draft(directory: str | Path) -> tuple[EagleConfig, Params]:
    """Reads an EAGLE-1 draft; an embedding among its tensors (the target's) is ignored.

    Raises:
        ValueError: as in `load_target`.
    """
    directory = Path(directory)
    settings, family = _read_config(directory)
    if settings.get("draft_vocab_size"):
        raise ValueError(f"{directory}: is an EAGLE-3 draft; give an EAGLE-1 or EAGLE-2 one")
    config = _build(directory, EagleConfig, settings, family)
    return config, _load(directory, config, {"embed_tokens.weight"})


def check_fit(target_config: TransformerConfig, draft_config: EagleConfig) -> None:
    """Checks that a draft was made for targets of this size.

    Raises:
        ValueError: names the first field that differs, with both values.
    """
    for name in ("hidden_size", "vocab_size"):
        target, draft = getattr(target_config, name), getattr(draft_config, name)
        if target != draft:
            raise ValueError(
                f"{name}: the target has {target}, the draft {draft}; "
                "give a draft that was trained for this target"
            )


def _layer_shapes(config: TransformerConfig | EagleConfig, prefix: str) -> dict[str, Shape]:
    d, f, e = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    result: dict[str, Shape] = {}
    for name, width in (("q", heads * e), ("k", kv_heads * e), ("v", kv_heads * e)):
        result[f"self_attn.{name}_proj.kernel"] = (d, width)
        if config.attention_bias:
            result[f"self_attn.{name}_proj.bias"] = (width,)
    result |= {
        "self_attn.o_proj.kernel": (heads * e, d),
        "mlp.gate_proj.kernel": (d, f),
        "mlp.up_proj.kernel": (d, f),
        "mlp.down_proj.kernel": (f, d),
        "input_layernorm.scale": (d,),
        "post_attention_layernorm.scale": (d,),
    }
    return {prefix + name: shape for name, shape in result.items()}


def _disk_name(config: TransformerConfig | EagleConfig, name: str) -> tuple[str, bool]:
    """The name on disk of a Flax name, and whether the tensor is transposed there."""
    stem, leaf = name.rsplit(".", 1)
    leaf, transposed = LEAVES[leaf]
    bare = isinstance(config, EagleConfig) or stem == "lm_head"
    return f"{'' if bare else 'model.'}{stem}.{leaf}", transposed


def _common_json(
    config: TransformerConfig | EagleConfig, model_type: str, dtype: str
) -> dict[str, Any]:
    shared = {field.name for field in dataclasses.fields(TransformerConfig)}
    shared &= {field.name for field in dataclasses.fields(EagleConfig)}
    shared -= {"attention_bias"}  # the model type says it
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


def _save(
    directory: Path,
    config: TransformerConfig | EagleConfig,
    params: Mapping[str, Any],
    dtype: str,
    settings: Mapping[str, Any],
) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: must be one of {', '.join(DTYPES)}")
    expected = shapes(config)
    _compare("params", {name: np.shape(value) for name, value in params.items()}, expected)
    tensors = {}
    for name in expected:
        disk, transposed = _disk_name(config, name)
        array = np.asarray(params[name]).astype(dtype)
        tensors[disk] = array.T if transposed else array
    directory.mkdir(parents=True, exist_ok=True)
    safetensors.write(directory / "model.safetensors", tensors, {"format": "pt"})
    with safetensors.replacing(directory / "config.json") as file:
        file.write(json.dumps(settings, indent=2).encode() + b"\n")


def _load(directory: Path, config: TransformerConfig | EagleConfig, ignored: set[str]) -> Params:
    tensors = _read_tensors(directory)
    names = {name: _disk_name(config, name) for name in shapes(config)}
    expected = {
        names[name][0]: shape[::-1] if names[name][1] else shape
        for name, shape in shapes(config).items()
    }
    found = {
        name: array.shape
        for name, array in tensors.items()
        # A buffer that transformers 4.30 and older stored; it follows from rope_theta.
        if name not in ignored and not name.endswith("rotary_emb.inv_freq")
    }
    _compare(str(directory), found, expected)
    return {
        name: tensors[disk].T if transposed else tensors[disk]
        for name, (disk, transposed) in names.items()
    }


def _read_tensors(directory: Path) -> Params:
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        if not (directory / "model.safetensors").is_file():
            raise ValueError(
                f"{directory}: has no model.safetensors; "
                "export the model again with safetensors (torch .bin files are not read)"
            )
        return safetensors.read(directory / "model.safetensors")
    files = _read_json(index).get("weight_map")
    if not isinstance(files, dict):
        raise ValueError(f"{index}: has no weight_map; download the file again")
    tensors: Params = {}
    for name in sorted(set(files.values())):
        tensors |= safetensors.read(directory / name)
    return tensors


def _compare(where: str, found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> None:
    for problem, names in (
        ("lacks tensors", expected.keys() - found.keys()),
        ("has unexpected tensors", found.keys() - expected.keys()),
    ):
        if names:
            raise ValueError(
                f"{where}: {problem} {_some(sorted(names))}; "
                "the configuration and the weights must belong to the same model"
            )
    for name, shape in expected.items():
        if found[name] != shape:
            raise ValueError(
                f"{where}: {name} has shape {found[name]}, the configuration implies {shape}; "
                "both must belong to the same model"
            )


def _some(names: Sequence[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _read_json(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; give a Hugging Face model directory") from None
    except ValueError as error:  # of JSON and of UTF-8
        raise ValueError(f"{path}: not valid JSON ({error}); download the file again") from error
    if not isinstance(result, dict):
        raise ValueError(f"{path}: holds no JSON object; download the file again")
    return result


def _read_config(directory: Path) -> tuple[dict[str, Any], Family]:
    path = directory / "config.json"
    settings = {key: value for key, value in _read_json(path).items() if value is not None}
    model_type = settings.get("model_type", "llama")  # the oldest heads name none
    if model_type not in FAMILIES:
        raise ValueError(
            f"{path}: model_type={model_type!r} is not supported; known: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[model_type]
    for key, value in family.fixed.items():
        if settings.get(key, value) != value:
            raise ValueError(f"{path}: {key}={settings[key]!r} is not supported; only {value!r} is")
    return settings, family


def _build(directory: Path, kind: type, settings: Mapping[str, Any], family: Family) -> Any:
    """An instance of the configuration `kind` from the keys of `config.json`."""
    try:
        config = kind(**_values(kind, settings, family))
        check(config)
        return config
    except ValueError as error:
        raise ValueError(f"{directory / 'config.json'}: {error}") from error


def _values(kind: type, settings: Mapping[str, Any], family: Family) -> dict[str, Any]:
    values: dict[str, Any] = {
        "attention_bias": _attention_bias(kind, settings, family),
        "rope_theta": _rope_theta(settings),
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
    return settings.get("qkv_bias", False) if kind is EagleConfig else family.attention_bias


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
