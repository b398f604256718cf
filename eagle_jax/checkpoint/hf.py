"""Hugging Face directories (`config.json`, `model.safetensors`) <-> configuration, parameters.

A target is what `transformers` reads; each kind of draft has files of its own
(`eagle_jax.drafters`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eagle_jax.checkpoint import families, files
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
    settings = targets.settings(config, dtype, bos_token_id, eos_token_id)
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
    own = registry.by_config(config).checkpoint()
    files.check_params(config, params, dtype)
    settings = own.settings(config, dtype, coverage)
    files.write(directory, config, params, dtype, settings, own.tables(config, params))


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

    They are those of the files; `DraftFiles.for_decoding` adds what a module takes of the target's.

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
    spec, settings, tensors = recognise(directory)
    settings = _supported(directory, settings)
    return spec.checkpoint().read(directory, settings, tensors, target)


def recognise(directory: Path) -> tuple[DrafterSpec, dict[str, Any], files.LazyTensors]:
    """The drafter whose files a directory holds, the keys of `config.json`, and the tensors.

    A target is recognised as an independent model; no tensor is read.

    Raises:
        ValueError: a file is missing or corrupt.
    """
    settings = families.flat(files.read_json(directory / "config.json"))
    settings, tensors = families.text_part(settings, files.read_tensors(directory))
    return registry.recognise(settings, list(tensors)), settings, tensors


def kind(directory: Path) -> str:
    """The kind of draft that a directory holds; "model" for a whole model."""
    return recognise(directory)[0].kind


def is_whole(directory: Path) -> bool:
    """Whether a directory holds a whole model, which can be a target."""
    return recognise(directory)[0].checkpoint().whole


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
    try:
        registry.by_config(draft_config).checkpoint().check_fit(target_config, draft_config)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}" if directory else str(error)) from error


def _supported(directory: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """`settings`, unless the weights are quantised, which raises a ValueError."""
    if "quantization_config" in settings:
        found = settings["quantization_config"]
        method = found.get("quant_method") if isinstance(found, Mapping) else found
        raise ValueError(
            f"{directory / 'config.json'}: quantization_config={method!r}: quantised weights are "
            "not read; give the model as it was before it was quantised"
        )
    return settings
