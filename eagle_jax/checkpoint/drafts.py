"""The layouts of published drafts: EAGLE-1, EAGLE-3 and Medusa heads.

Each has a function that makes `config.json` and one that reads configuration and arrays back.
`hf.save_draft` and `hf.load_draft` choose among them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from eagle_jax.checkpoint import families
from eagle_jax.checkpoint.files import Arrays, LazyTensors, arrays, check_counts
from eagle_jax.checkpoint.lazy_tensor import LazyTensor, lazily
from eagle_jax.config import (
    DraftConfig,
    Eagle3Config,
    EagleConfig,
    MedusaConfig,
    TransformerConfig,
)

AUX = "eagle_aux_hidden_state_layer_ids"
"""Key of the layers whose residual streams are fused: stacks disagree about their numbers."""

COVERAGE = "draft_vocab_coverage"
"""Key of the share of the training tokens that the draft vocabulary has."""

_MEDUSA_PREFIX = "medusa_head."
_MEDUSA_KEYS = {
    "num_heads": "medusa_num_heads",
    "num_layers": "medusa_num_layers",
    "hidden_size": "hidden_size",
    "vocab_size": "vocab_size",
    "tie_lm_head": "tie_lm_head",
}
EMBEDDING = "embed_tokens.weight"
"""A copy of the target's, in some heads."""

# vLLM's names of the tables.
_ALIASES = {"draft_id_to_target_id": "d2t"}


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` with the nested layer of speculators' files beside the other keys."""
    nested = settings.get("transformer_layer_config")
    if not isinstance(nested, Mapping):
        return dict(settings)
    nested = {key: value for key, value in nested.items() if value is not None}
    # vLLM takes true where such a file has no word on it.
    own = {key: value for key, value in settings.items() if key not in ("model_type",)}
    return {"norm_before_residual": True, **nested, **own}


def kind_of(settings: Mapping[str, Any], names: Iterable[str]) -> str:
    """The kind of draft that a directory holds, from its `config.json` and its tensors' names."""
    names = list(names)
    if "medusa_num_heads" in settings or any(_medusa_block(name) for name in names):
        return "medusa"
    if any(name.startswith("midlayer.") or name.endswith("hidden_norm.weight") for name in names):
        return "eagle3"
    eagle = any(name.startswith(("fc.", "layers.0.")) for name in names)
    if "draft_vocab_size" in settings or any(name in ("d2t", "t2d") for name in names):
        # EAGLE-1 has no head of its own, whatever it drafts.
        own_head = any(name.endswith("lm_head.weight") for name in names)
        return "eagle" if eagle and not own_head else "eagle3"
    if any(name.startswith("model.") for name in names):
        return "model"
    return "eagle" if eagle else "model"


def eagle_json(config: EagleConfig, dtype: str, coverage: float | None) -> dict[str, Any]:
    """`config.json` of an EAGLE-1 draft."""
    settings = families.to_json(config, "llama", dtype) | {
        "num_hidden_layers": 1,
        "bias": config.bias,
        "qkv_bias": config.attention_bias,
    }
    if config.draft_vocab_size is not None:
        settings["draft_vocab_size"] = config.draft_vocab_size
    return settings if coverage is None else settings | {COVERAGE: coverage}


def read_eagle(
    directory: Path, settings: Mapping[str, Any], tensors: LazyTensors
) -> tuple[EagleConfig, LazyTensors]:
    """An EAGLE-1 draft; an embedding among its tensors is ignored.

    With a draft vocabulary `params["d2t"]` is int32; `with_head` adds what else the module needs.
    """
    tensors = dict(tensors)
    settings = {"bias": "fc.bias" in tensors, **_biases("layers.0.", settings, tensors)}
    config = families.from_json(directory, EagleConfig, settings)
    if config.draft_vocab_size == config.vocab_size and "d2t" not in tensors:
        config = dataclasses.replace(config, draft_vocab_size=None)
    if config.draft_vocab_size is None:
        return config, arrays(directory, config, tensors, EMBEDDING)
    found = _tables(tensors)
    params = arrays(directory, config, tensors, EMBEDDING)
    params["d2t"] = _offsets(directory, config, *found)
    return config, params


def with_head(
    config: DraftConfig,
    params: Mapping[str, LazyTensor],
    target_config: TransformerConfig,
    target: Mapping[str, LazyTensor],
) -> Mapping[str, LazyTensor]:
    """The parameters of a draft as its module has them: EAGLE-1's draft vocabulary is columns of
    the target's head, which are gathered when they are read."""
    if not isinstance(config, EagleConfig) or config.draft_vocab_size is None:
        return params
    tokens = _tokens("params", config, np.asarray(params["d2t"]))
    tied = target_config.tie_word_embeddings
    rows = target["embed_tokens.embedding"] if tied else target["lm_head.kernel"].T
    return {**params, "lm_head.kernel": rows.rows(tokens).T}


def eagle3_json(config: Eagle3Config, dtype: str, coverage: float | None) -> dict[str, Any]:
    """`config.json` of an EAGLE-3 draft."""
    settings = families.to_json(config, "llama", dtype) | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "num_hidden_layers": 1,
        "draft_vocab_size": config.draft_vocab_size,
        AUX: list(config.aux_layers),
        "fc_norm": config.fc_norm,
        "norm_output": config.norm_output,
        "qkv_bias": config.attention_bias,
        "target_hidden_size": config.feature_size,
    }
    return settings if coverage is None else settings | {COVERAGE: coverage}


def tables(config: DraftConfig, params: Mapping[str, Any]) -> Arrays:
    """`d2t` (int64 offsets) of a draft that has one; of EAGLE-3 also `t2d` (membership of each of
    the target's tokens).

    Raises:
        ValueError: the offsets leave the vocabulary or repeat a token.
    """
    if not isinstance(config, EagleConfig | Eagle3Config) or config.draft_vocab_size is None:
        return {}
    offsets = np.asarray(params["d2t"])
    tokens = _tokens("params", config, offsets)
    result: Arrays = {"d2t": offsets.astype(np.int64)}
    if isinstance(config, Eagle3Config):
        result["t2d"] = np.isin(np.arange(config.vocab_size), tokens)
    return result


def read_eagle3(
    directory: Path,
    settings: Mapping[str, Any],
    tensors: LazyTensors,
    target: TransformerConfig | None,
) -> tuple[Eagle3Config, LazyTensors]:
    """An EAGLE-3 draft; `params["d2t"]` is int32.

    An embedding as wide as the target's is a copy of that and ignored.
    """
    path = directory / "config.json"
    tensors = {_official(name): array for name, array in tensors.items()}
    settings = _biases("midlayer.", settings, tensors)
    fixed = ("norm_before_residual", "norm_before_fc", "tie_word_embeddings")
    families.check_fixed(path, settings, dict.fromkeys(fixed, False))
    head = tensors.get("lm_head.weight")
    if "d2t" not in tensors and head is not None and head.shape[0] == settings.get("vocab_size"):
        settings = {"draft_vocab_size": head.shape[0], **settings}
    width = settings.get("target_hidden_size")
    own = {
        "aux_layers": _aux_layers(path, settings, target),
        "fc_norm": settings.get("fc_norm", "fc_norm.0.weight" in tensors),
        "target_hidden_size": None if width == settings.get("hidden_size") else width,
    }
    config = families.from_json(directory, Eagle3Config, {**settings, **own})
    found = _tables(tensors)
    copies = () if config.target_hidden_size else (EMBEDDING,)
    params = arrays(directory, config, tensors, *copies)
    params["d2t"] = _offsets(directory, config, *found)
    return config, params


def medusa_json(config: MedusaConfig, dtype: str) -> dict[str, Any]:
    """`config.json` of Medusa heads."""
    return {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        **{key: getattr(config, name) for name, key in _MEDUSA_KEYS.items()},
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def read_medusa(
    directory: Path,
    settings: Mapping[str, Any],
    tensors: LazyTensors,
    target: TransformerConfig | None,
) -> tuple[MedusaConfig, LazyTensors]:
    """Medusa heads; published ones name no sizes; these follow from the tensors."""
    tensors = {name.removeprefix(_MEDUSA_PREFIX): array for name, array in tensors.items()}
    check_counts(directory, settings, ("medusa_num_heads", "medusa_num_layers"), tensors)
    layers = settings.get("medusa_num_layers", 1)
    block, head = tensors.get("0.0.linear.weight"), tensors.get(f"0.{layers}.weight")
    found: dict[str, Any] = {"num_layers": layers, "tie_lm_head": head is None}
    if block is not None:
        found["hidden_size"] = block.shape[0]
    if head is not None:
        found["vocab_size"] = head.shape[0]
    elif target is not None:
        found["vocab_size"] = target.vocab_size
    for name, key in _MEDUSA_KEYS.items():
        if key in settings:
            found[name] = settings[key]
        elif name not in found:
            raise ValueError(f"{directory / 'config.json'}: has no {key}; add it")
    config = families.build(directory, MedusaConfig, lambda: found)
    return config, arrays(directory, config, tensors)


def official_layers(target: TransformerConfig) -> tuple[int, ...]:
    """The layers that official EAGLE-3 heads fuse, by the layer that the streams enter."""
    layers = target.num_hidden_layers
    return (2, layers // 2, layers - 3)


def own_embedding(tensors: LazyTensors) -> LazyTensor | None:
    """The copy of the target's embedding that a draft's file may have."""
    return tensors.get(EMBEDDING, tensors.get(f"model.{EMBEDDING}"))


def close(own: LazyTensor, embedding: LazyTensor, *, sample: bool = False) -> bool:
    """Whether a copy is the same matrix, up to the rounding of 16-bit formats.

    Args:
        own: the copy.
        embedding: the matrix.
        sample: compare a few rows only, without reading the others.
    """
    if own.shape != embedding.shape:
        return False
    rows = 32 if sample else 1024  # wide copies of all rows would take several times more
    starts = range(0, len(own), max(rows, len(own) // 16) if sample else rows)
    for one, two in zip(own.blocks(starts, rows), embedding.blocks(starts, rows), strict=True):
        wide, other = one.astype(np.float32), two.astype(np.float32)
        if np.any(np.abs(wide - other) > 0.01 * np.abs(other) + 1e-6):
            return False
    return True


def _official(name: str) -> str:
    """The name of an EAGLE-3 tensor, from that or from those that serving stacks give."""
    name = name.removeprefix("model.")
    return re.sub(r"^layers\.0\.", "midlayer.", _ALIASES.get(name, name))


def _biases(prefix: str, settings: Mapping[str, Any], tensors: LazyTensors) -> dict[str, Any]:
    """With `qkv_bias` as the tensors tell where no key does: Qwen's heads have them unannounced.

    Serving stacks say `attention_bias` and put a bias on o_proj too; ours has none, and a bias of
    zeros is dropped from `tensors`.
    """
    found = f"{prefix}self_attn.q_proj.bias" in tensors
    own = {key: value for key, value in settings.items() if key != "attention_bias"}
    if not found:
        own = dict(settings)
    output = tensors.get(f"{prefix}self_attn.o_proj.bias")
    if output is not None and not np.any(np.asarray(output).astype(np.float32)):
        del tensors[f"{prefix}self_attn.o_proj.bias"]
    return {"qkv_bias": found, **own}


def _medusa_block(name: str) -> bool:
    return re.fullmatch(r"(medusa_head\.)?\d+\.\d+\.linear\.(weight|bias)", name) is not None


def _aux_layers(
    path: Path, settings: Mapping[str, Any], target: TransformerConfig | None
) -> tuple[int, ...]:
    """The fused layers, by the layer that their residual streams enter."""
    nested = settings.get("eagle_config")
    nested = nested.get(AUX) if isinstance(nested, dict) else None
    # At the top the numbers are those of vLLM: the layers entered. SGLang, which reads
    # `eagle_config`, numbers the layers left.
    ids, shift = (settings[AUX], 0) if AUX in settings else (nested, 1)
    if ids:
        if not isinstance(ids, list) or any(type(index) is not int for index in ids):
            raise ValueError(f"{path}: {AUX}={ids!r}: must be a list of layer numbers")
        return tuple(index + shift for index in ids)
    if target is None:
        raise ValueError(
            f"{path}: has no {AUX}, and the official layers depend on the target; "
            "add the key, or open the draft together with its target (--target; or load(TARGET, "
            "draft=...))"
        )
    return official_layers(target)


def _tables(tensors: LazyTensors) -> list[np.ndarray | None]:
    """`d2t` and `t2d`, if they are there, taken out of `tensors`."""
    found = [tensors.pop(name, None) for name in ("d2t", "t2d")]
    return [None if table is None else np.asarray(table) for table in found]


def _offsets(
    directory: Path,
    config: EagleConfig | Eagle3Config,
    offsets: np.ndarray | None,
    members: np.ndarray | None,
) -> LazyTensor:
    """Checked `d2t`, int32; zeros where the draft has the whole vocabulary and no table."""
    draft_vocab, vocab = config.draft_vocab_size or 0, config.vocab_size
    if offsets is None and draft_vocab < vocab:
        raise ValueError(
            f"{directory}: has no d2t, though draft_vocab_size={draft_vocab} is less than "
            f"vocab_size={vocab}; export the draft again with it"
        )
    if offsets is None:
        offsets = np.zeros(draft_vocab, np.int64)
    tokens = _tokens(str(directory), config, offsets)
    if members is not None:
        marked = np.flatnonzero(members) if members.shape == (vocab,) else np.zeros(0, int)
        if not np.array_equal(marked, np.sort(tokens)):
            raise ValueError(
                f"{directory}: t2d marks other tokens than d2t lists; export the draft again"
            )
    return lazily(offsets.astype(np.int32))


def _tokens(where: str, config: EagleConfig | Eagle3Config, offsets: np.ndarray) -> np.ndarray:
    """The target's token of every entry of the draft vocabulary."""
    draft_vocab, vocab = config.draft_vocab_size or 0, config.vocab_size
    remedy = "export the draft again"
    if offsets.shape != (draft_vocab,) or not np.issubdtype(offsets.dtype, np.integer):
        raise ValueError(
            f"{where}: d2t is {offsets.dtype} of shape {offsets.shape}, "
            f"not integers of shape {(draft_vocab,)}; {remedy}"
        )
    tokens = np.arange(draft_vocab) + offsets.astype(np.int64)
    for wrong in np.flatnonzero((tokens < 0) | (tokens >= vocab))[:1]:
        raise ValueError(
            f"{where}: d2t maps entry {wrong} to token {tokens[wrong]}, outside "
            f"vocab_size={vocab}; {remedy}"
        )
    unique, counts = np.unique(tokens, return_counts=True)
    for token in unique[counts > 1][:1]:
        raise ValueError(f"{where}: d2t lists token {token} more than once; {remedy}")
    return tokens
