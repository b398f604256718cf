"""Hugging Face directories (`config.json`, `model.safetensors`) <-> configuration, parameters.

A target is what `transformers` reads; drafts have the layouts of published heads (`drafts`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eagle_jax.checkpoint import drafts, families, files
from eagle_jax.checkpoint.lazy_tensor import equal
from eagle_jax.checkpoint.names import shapes
from eagle_jax.config import DraftConfig, Eagle3Config, EagleConfig, MedusaConfig, TransformerConfig

__all__ = [
    "check_fit",
    "kind",
    "load_draft",
    "load_target",
    "open_draft",
    "open_target",
    "save_draft",
    "save_target",
    "shapes",
]


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
        dtype: of the weights on disk: "float32", "bfloat16" or "float16".
        bos_token_id: begins a text, or none.
        eos_token_id: ends a text, one or several, or none.

    Raises:
        ValueError: `params` don't match `config`, are quantised, or an unknown dtype.
    """
    _check_floats("quantize", params)
    family = families.family_of(config)
    settings = families.to_json(config, family, dtype) | {
        "num_hidden_layers": config.num_hidden_layers,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        # Written even when null: transformers would otherwise take Llama-2's 1 and 2.
        "bos_token_id": bos_token_id,
        "eos_token_id": list(eos_token_id) if isinstance(eos_token_id, Sequence) else eos_token_id,
    }
    files.write(directory, config, params, dtype, settings)


def load_target(directory: str | Path) -> tuple[TransformerConfig, files.Arrays]:
    """Reads a target; weights keep their dtype. Sharded directories can be read too.

    Raises:
        ValueError: as in `open_target`.
    """
    config, params = open_target(directory)
    return config, files.in_memory(params)


def open_target(directory: str | Path) -> tuple[TransformerConfig, files.LazyTensors]:
    """A target's configuration and weights, each of which is read when it is asked for.

    Raises:
        ValueError: a file is missing or corrupt, the model type or one of its settings is not
            supported, or a tensor is missing, unexpected or of a wrong shape.
    """
    directory = Path(directory)
    settings, tensors = families.text_part(_settings(directory), files.read_tensors(directory))
    found = drafts.kind_of(settings, tensors)
    if found != "model":
        raise ValueError(
            f"{directory}: is a draft of kind {found!r}; give its target, and this as draft="
        )
    return _transformer(directory, settings, tensors)


def save_draft(
    directory: str | Path,
    config: DraftConfig,
    params: Mapping[str, Any],
    dtype: str = "bfloat16",
    *,
    coverage: float | None = None,
) -> None:
    """Writes a draft of any kind in the layout of published heads, without the embedding.

    Args:
        directory: created if missing.
        config: of the draft; an independent model is written as a target is.
        params: arrays with the names and shapes of `shapes(config)`; `d2t` holds offsets, int32
            [Vd].
        dtype: of the weights on disk: "float32", "bfloat16" or "float16".
        coverage: share of the tokens of some text, an EAGLE-3 draft's training text, that the
            draft vocabulary has, 0 to 1; noted in `config.json`.

    Raises:
        ValueError: `params` don't match `config`, are quantised, an unknown dtype, or a coverage
            that is out of range or of a draft that has the target's vocabulary.
    """
    if coverage is not None and getattr(config, "draft_vocab_size", None) is None:
        raise ValueError(
            f"coverage={coverage}: a draft of kind {config.kind!r} has the target's vocabulary; "
            "leave it out"
        )
    if coverage is not None and not 0 <= coverage <= 1:
        raise ValueError(f"coverage={coverage}: must be 0 to 1, a share of the counted tokens")
    _check_floats("quantize_drafts", params)
    if isinstance(config, TransformerConfig):
        save_target(directory, config, params, dtype)
        return
    files.check_params(config, params, dtype)
    if isinstance(config, EagleConfig):
        settings = drafts.eagle_json(config, dtype, coverage)
    elif isinstance(config, MedusaConfig):
        settings = drafts.medusa_json(config, dtype)
    else:
        settings = drafts.eagle3_json(config, dtype, coverage)
    files.write(directory, config, params, dtype, settings, drafts.tables(config, params))


def _check_floats(argument: str, params: Mapping[str, Any]) -> None:
    """Raises ValueError for a model whose matrices are stored in eight bits."""
    if any(getattr(array, "dtype", None) == np.int8 for array in params.values()):
        raise ValueError(
            f"{argument}='int8': quantised weights are not written; give the model as it was "
            f"before, load(..., {argument}=None)"
        )


def load_draft(
    directory: str | Path, target: TransformerConfig | None = None
) -> tuple[DraftConfig, files.Arrays]:
    """Reads a draft of any kind; weights keep their dtype.

    Args:
        directory, target: as in `open_draft`.

    Raises:
        ValueError: as in `open_draft`.
    """
    config, params = open_draft(directory, target)
    return config, files.in_memory(params)


def open_draft(
    directory: str | Path, target: TransformerConfig | None = None
) -> tuple[DraftConfig, files.LazyTensors]:
    """A draft of any kind: its configuration, and weights that are read when they are asked for.

    They are those of the files; `drafts.with_head` adds what a module takes of the target's.

    Args:
        directory: of the draft; its files say of which kind it is.
        target: the draft's target. Official EAGLE-3 heads leave it to the target's number of
            layers L which ones they read (2, L // 2, L - 3), tied Medusa heads its vocabulary.

    Raises:
        ValueError: as in `open_target`; a draft's `d2t` is missing, leaves the vocabulary, repeats
            a token or contradicts `t2d`; or what follows from the target is needed and there is
            none.
    """
    directory = Path(directory)
    settings, tensors = families.text_part(_settings(directory), files.read_tensors(directory))
    found = drafts.kind_of(settings, tensors)
    if found == "eagle":
        return drafts.read_eagle(directory, settings, tensors)
    if found == "eagle3":
        return drafts.read_eagle3(directory, settings, tensors, target)
    if found == "medusa":
        return drafts.read_medusa(directory, settings, tensors, target)
    return _transformer(directory, settings, tensors)


def kind(directory: Path) -> str:
    """The kind of draft that a directory holds; "model" for a whole model."""
    settings = drafts.flat(files.read_json(directory / "config.json"))
    return drafts.kind_of(settings, files.read_tensors(directory))


def check_fit(
    target_config: TransformerConfig, draft_config: DraftConfig, directory: Path | None = None
) -> None:
    """Checks that a draft was made for targets of this size.

    Args:
        target_config, draft_config: of the two.
        directory: of the draft, for the message of an error.

    Raises:
        ValueError: names the first field that does not fit, with both values.
    """
    remedy = "give a draft that was trained for this target"
    where = "" if directory is None else f"{directory}: "
    # An independent model has a width of its own.
    alone = isinstance(draft_config, TransformerConfig)
    for name in ("vocab_size",) if alone else ("hidden_size", "vocab_size"):
        target, draft = getattr(target_config, name), getattr(draft_config, name)
        if name == "hidden_size" and isinstance(draft_config, Eagle3Config):
            draft = draft_config.feature_size
        if target != draft:
            raise ValueError(f"{where}{name}: the target has {target}, the draft {draft}; {remedy}")
    if isinstance(draft_config, Eagle3Config):
        layers = target_config.num_hidden_layers
        if max(draft_config.aux_layers) > layers:
            raise ValueError(
                f"{where}aux_layers: the target has {layers} layers, "
                f"the draft reads {draft_config.aux_layers}; {remedy}"
            )


def _settings(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    settings = drafts.flat(files.read_json(path))
    if "quantization_config" in settings:
        found = settings["quantization_config"]
        method = found.get("quant_method") if isinstance(found, Mapping) else found
        raise ValueError(
            f"{path}: quantization_config={method!r}: quantised weights are not read; give the "
            "model as it was before it was quantised"
        )
    return settings


def _transformer(
    directory: Path, settings: Mapping[str, Any], tensors: files.LazyTensors
) -> tuple[TransformerConfig, files.LazyTensors]:
    counts = ("num_hidden_layers", "num_experts", "num_local_experts")
    files.check_counts(directory, settings, counts, tensors)
    config = families.from_json(directory, TransformerConfig, settings)
    tied = ["lm_head.weight"] if config.tie_word_embeddings else []
    head, embedding = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    if tied and head is not None and embedding is not None and not equal(head, embedding):
        # transformers ties no head that a file has and that differs.
        config, tied = dataclasses.replace(config, tie_word_embeddings=False), []
    return config, files.arrays(directory, config, tensors, *tied)
