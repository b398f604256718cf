"""Reads and writes Hugging Face directories (`config.json`, `model.safetensors`).

Targets have the files that `transformers` reads; each kind of draft has its own file format
(`eagle_jax.drafters`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eagle_jax.checkpoint import config_json, files
from eagle_jax.checkpoint import target as targets
from eagle_jax.checkpoint.names import shapes
from eagle_jax.config import DraftConfig, TransformerConfig
from eagle_jax.drafters import registry
from eagle_jax.drafters.spec import DrafterSpec

__all__ = [
    "check_fit",
    "is_whole",
    "kind",
    "load_draft",
    "load_target",
    "open_draft",
    "open_target",
    "recognise",
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
    """Writes a target directory that `transformers.AutoModelForCausalLM.from_pretrained` opens.

    Args:
        directory: where to write; created if missing.
        config: the target's configuration.
        params: arrays with the names and shapes of `shapes(config)`.
        dtype: dtype of the weights on disk: "float32", "bfloat16" or "float16".
        bos_token_id: the token that begins a text, or None.
        eos_token_id: the token or tokens that end a text, or None.

    Raises:
        ValueError: `params` don't match `config` or are quantised, or the dtype is unknown.
    """
    _check_floats("quantize", params)
    settings = targets.settings(config, dtype, bos_token_id, eos_token_id)
    files.write(directory, config, params, dtype, settings)


def load_target(directory: str | Path) -> tuple[TransformerConfig, files.Arrays]:
    """Returns a target's configuration and its weights, read into memory in their dtype on disk.

    Raises:
        ValueError: as in `open_target`.
    """
    config, params = open_target(directory)
    return config, files.in_memory(params)


def open_target(directory: str | Path) -> tuple[TransformerConfig, files.LazyTensors]:
    """Returns a target's configuration and its weights, each of which is read when it is used.

    Raises:
        ValueError: a file is missing or corrupt, the model type or one of its settings is not
            supported, or a tensor is missing, unexpected or of a wrong shape.
    """
    directory = Path(directory)
    spec, settings, tensors = recognise(directory)
    if not spec.checkpoint().whole:
        raise ValueError(
            f"{directory}: is a draft of kind {spec.kind!r}; give its target, and this as draft="
        )
    return targets.read(directory, _supported(directory, settings), tensors)


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
        directory: where to write; created if missing.
        config: the draft's configuration; an independent model is written like a target.
        params: arrays with the names and shapes of `shapes(config)`; `d2t` holds offsets, int32
            [Vd].
        dtype: dtype of the weights on disk: "float32", "bfloat16" or "float16".
        coverage: share (0 to 1) of the training text's tokens that are in the draft vocabulary;
            noted in `config.json`.

    Raises:
        ValueError: `params` don't match `config` or are quantised, the dtype is unknown, or
            `coverage` is out of range or given for a draft without a draft vocabulary.
    """
    if coverage is not None and getattr(config, "draft_vocab_size", None) is None:
        raise ValueError(
            f"coverage={coverage}: a draft of kind {config.kind!r} has the target's vocabulary; "
            "leave it out"
        )
    if coverage is not None and not 0 <= coverage <= 1:
        raise ValueError(f"coverage={coverage}: must be 0 to 1, a share of the counted tokens")
    _check_floats("quantize_drafts", params)
    own = registry.by_config(config).checkpoint()
    files.check_params(config, params, dtype)
    settings = own.settings(config, dtype, coverage)
    files.write(directory, config, params, dtype, settings, own.tables(config, params))


def _check_floats(argument: str, params: Mapping[str, Any]) -> None:
    """Raises ValueError if a model's matrices are stored in eight bits."""
    if any(getattr(array, "dtype", None) == np.int8 for array in params.values()):
        raise ValueError(
            f"{argument}='int8': quantised weights are not written; give the model as it was "
            f"before, load(..., {argument}=None)"
        )


def load_draft(
    directory: str | Path, target: TransformerConfig | None = None
) -> tuple[DraftConfig, files.Arrays]:
    """Returns a draft's configuration and its weights, read into memory in their dtype on disk.

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
    """Returns the configuration of a draft of any kind, and its weights, each read when it is used.

    The weights are those in the files; `DraftFiles.for_decoding` adds those shared with the target.

    Args:
        directory: the draft's directory; its files tell the kind of draft.
        target: the configuration of the draft's target. Official EAGLE-3 heads need it for the
            layers that they read (2, L // 2, L - 3 of L layers), tied Medusa heads for the
            vocabulary.

    Raises:
        ValueError: as in `open_target`; or `d2t` is missing, names tokens outside the vocabulary,
            repeats one or contradicts `t2d`; or the target is needed and not given.
    """
    directory = Path(directory)
    spec, settings, tensors = recognise(directory)
    settings = _supported(directory, settings)
    return spec.checkpoint().read(directory, settings, tensors, target)


def recognise(directory: Path) -> tuple[DrafterSpec, dict[str, Any], files.LazyTensors]:
    """Returns the drafter whose files a directory holds, the keys of `config.json`, and tensors.

    A target is recognised as an independent model. No tensor is read.

    Raises:
        ValueError: a file is missing or corrupt.
    """
    settings = config_json.flat(files.read_json(directory / "config.json"))
    settings, tensors = config_json.text_part(settings, files.read_tensors(directory))
    return registry.recognise(settings, list(tensors)), settings, tensors


def kind(directory: Path) -> str:
    """Returns the kind of draft that a directory holds, "model" for a whole model."""
    return recognise(directory)[0].kind


def is_whole(directory: Path) -> bool:
    """Returns whether a directory holds a whole model, which can be a target."""
    return recognise(directory)[0].checkpoint().whole


def check_fit(
    target_config: TransformerConfig, draft_config: DraftConfig, directory: Path | None = None
) -> None:
    """Checks that a draft's sizes fit the target.

    Args:
        target_config: the target's configuration.
        draft_config: the draft's configuration.
        directory: the draft's directory, for error messages.

    Raises:
        ValueError: a field does not fit; the message names the first one and both values.
    """
    try:
        registry.by_config(draft_config).checkpoint().check_fit(target_config, draft_config)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}" if directory else str(error)) from error


def _supported(directory: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Returns `settings`, or raises ValueError if they describe quantised weights."""
    if "quantization_config" in settings:
        found = settings["quantization_config"]
        method = found.get("quant_method") if isinstance(found, Mapping) else found
        raise ValueError(
            f"{directory / 'config.json'}: quantization_config={method!r}: quantised weights are "
            "not read; give the model as it was before it was quantised"
        )
    return settings
