"""What a checkpoint is: its kind, its sizes, and what it lacks that others of its kind have."""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eagle_jax.checkpoint import drafts as layouts
from eagle_jax.checkpoint import families, files, hf
from eagle_jax.checkpoint.lazy_tensor import LazyTensor
from eagle_jax.config import DraftConfig, Eagle3Config, EagleConfig, TransformerConfig


def describe(directory: Path, target: Path | None) -> dict[str, Any]:
    """Kind, family, sizes and what is lacking of one directory, of which only headers are read.

    Args:
        directory: of a target or of a draft.
        target: directory of the draft's target, if it is known.

    Raises:
        ValueError: a file is missing or corrupt. A checkpoint that is whole and that this library
            cannot run is described; "cannot be loaded" says why.
    """
    settings, tensors = families.text_part(
        layouts.flat(files.read_json(directory / "config.json")), files.read_tensors(directory)
    )
    kind = layouts.kind_of(settings, tensors)
    weights = {name: x for name, x in tensors.items() if x.dtype.kind not in "iub"}
    dtypes = collections.Counter(x.dtype.name for x in weights.values())
    about: dict[str, Any] = {
        "kind": "target" if kind == "model" else kind,
        "family": settings.get("model_type", "none named"),
        "architectures": settings.get("architectures", []),
        "parameters": sum(math.prod(x.shape) for x in weights.values()),
        "bytes": sum(x.nbytes for x in tensors.values()),
        "tensors": len(tensors),
        "dtypes": dict(dtypes),
    }
    about |= {key: settings[key] for key in _SIZES if key in settings}
    about["lacks"] = _lacks(directory, kind, settings, tensors)
    try:
        config = None if target is None else hf.open_target(target)[0]
        opened, params = hf.open_draft(directory, config)
        if config is not None and kind != "model":
            hf.check_fit(config, opened)
        about |= _opened(opened, params, settings)
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
    "medusa_num_heads",
    "medusa_num_layers",
)


def _opened(
    config: DraftConfig, params: Mapping[str, LazyTensor], settings: Mapping[str, Any]
) -> dict[str, Any]:
    about: dict[str, Any] = {}
    if not isinstance(config, TransformerConfig):
        about["parameters without embedding"] = sum(
            math.prod(x.shape)
            for name, x in params.items()
            if name not in ("d2t", "embed_tokens.embedding")
        )
    theta = getattr(config, "rope_theta", None)
    if theta is not None:
        about["rope_theta"] = theta
    if isinstance(config, EagleConfig | Eagle3Config) and config.draft_vocab_size is not None:
        share = config.draft_vocab_size / config.vocab_size
        about["draft vocabulary"] = (
            f"{config.draft_vocab_size} of {config.vocab_size} tokens ({share:.1%})"
        )
        coverage = settings.get(layouts.COVERAGE)
        known = isinstance(coverage, int | float)
        said = f"{coverage:.2%}" if known else "not recorded" if coverage is None else coverage
        about["coverage of the training text"] = said
    if isinstance(config, Eagle3Config):
        about["fused layers"] = list(config.aux_layers)
    return about


def _lacks(
    directory: Path, kind: str, settings: Mapping[str, Any], tensors: Mapping[str, Any]
) -> list[str]:
    """What others write and this directory has not; a default or the target stands in for it."""
    lacks = []
    if kind == "model":
        names = ("tokenizer.json", "generation_config.json")
        lacks += [name for name in names if not (directory / name).is_file()]
    if kind in ("model", "eagle", "eagle3"):
        if "rope_theta" not in settings and "rope_parameters" not in settings:
            lacks.append("rope_theta (the default of its model_type is taken)")
        if "max_position_embeddings" not in settings:
            lacks.append("max_position_embeddings (serving stacks take 2048)")
    if kind == "eagle" and layouts.EMBEDDING not in tensors:
        lacks.append(f"{layouts.EMBEDDING} (the target's is used)")
    names = {name.removeprefix("model.") for name in tensors}
    known = kind == "eagle3" or (kind == "eagle" and "draft_vocab_size" in settings)
    if known and not names & {"d2t", "draft_id_to_target_id"}:
        lacks.append("d2t")
    if known and layouts.COVERAGE not in settings:
        lacks.append(layouts.COVERAGE)
    if kind == "eagle3":
        if "t2d" not in names:
            lacks.append("t2d (follows from d2t)")
        nested = settings.get("eagle_config")
        if layouts.AUX not in settings and not (isinstance(nested, dict) and layouts.AUX in nested):
            lacks.append(f"{layouts.AUX} (follows from the target)")
    return lacks


def readable(found: Mapping[str, Any]) -> str:
    """Descriptions by part, as lines for people."""
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
