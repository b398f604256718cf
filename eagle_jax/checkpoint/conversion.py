"""The implementation of `eagle_jax.convert`: finds sources, writes targets and drafts, compares.

Only one tensor at a time is in memory. Files are written to a temporary directory, which is renamed
after they have been read back and compared.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eagle_jax.checkpoint import config_json, export, files, hf, manifest, safetensors
from eagle_jax.checkpoint.lazy_tensor import LazyTensor, cast
from eagle_jax.checkpoint.names import on_disk
from eagle_jax.config import DraftConfig
from eagle_jax.drafters import draft_vocabulary as vocabularies
from eagle_jax.drafters import registry
from eagle_jax.drafters.files import EMBEDDING, NATIVE, ExportTarget
from eagle_jax.drafters.one_layer import own_embedding, same_matrix

FORMATS = ("hf", *export.LAYOUTS, NATIVE)

# Files of a model directory that are copied, besides configuration and weights.
_OTHERS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
# Keys that a draft keeps although they do not affect its computation.
_KEPT = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
_KEPT += ("base_model_name_or_path",)  # the published loader of Medusa heads needs it


@dataclasses.dataclass(frozen=True)
class Source:
    """The source of a conversion: directories of a target and of drafts.

    Attributes:
        target: directory of the target, or None.
        drafts: directories of the drafts.
        root: the directory that holds target, drafts and manifest, or None.
    """

    target: Path | None
    drafts: tuple[Path, ...]
    root: Path | None = None


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A draft vocabulary for the EAGLE-1 head: offsets `d2t`, and the coverage."""

    offsets: np.ndarray
    coverage: float

    def said(self) -> dict[str, Any]:
        """Returns the keys that describe it in `config.json` and in the summary."""
        return {"draft_vocab_size": len(self.offsets), vocabularies.COVERAGE: self.coverage}


@dataclasses.dataclass(frozen=True)
class Job:
    """The options of a conversion, as in `eagle_jax.convert.convert`."""

    layout: str
    dtype: str | None
    progress: Any
    target_name: str | None
    vocabulary: Vocabulary | None = None

    def bar(self, total: int, text: str) -> Any:
        """Returns a progress bar over `total` bytes."""
        if self.progress is None:
            return export.NoBar()
        return self.progress(total=total, desc=text)


def source_of(path: str | Path, target: str | Path | None, drafts: Sequence[str | Path]) -> Source:
    """Returns the target and drafts that a user's paths name.

    Raises:
        ValueError: a target is given though the source has one.
    """
    from eagle_jax.params import find, own_drafts  # imports jax

    root = find(path)
    more = [Path(directory).expanduser() for directory in drafts]
    outer = target_of(target)
    if (root / "target").is_dir():
        if outer is not None:
            raise ValueError(f"target: {root} has a target of its own; leave --target out")
        return Source(root / "target", (*own_drafts(root), *more), root)
    if hf.is_whole(root):
        if outer is not None:  # a whole model that is the draft of a larger target
            return Source(outer, (root, *more))
        return Source(root, tuple(more))
    return Source(outer, (root, *more))


def target_of(path: str | Path | None) -> Path | None:
    """Returns the directory of a target, given it, its parent or a shipped name; None stays None.

    Raises:
        ValueError: the directory holds a draft.
    """
    from eagle_jax.params import find

    if path is None:
        return None
    root = find(path)
    root = root / "target" if (root / "target").is_dir() else root
    if not hf.is_whole(root):
        raise ValueError(f"target: {root} is a draft of kind {hf.kind(root)!r}; give its target")
    return root


def check_vocabulary(
    layout: str, kind: str | None, size: int | None, text: Sequence[str | Path]
) -> None:
    """Raises ValueError unless the arguments for a draft vocabulary are consistent."""
    if size is None:
        if text:
            raise ValueError(
                f"text={str(text[0])!r}: is read for a draft vocabulary; give its size with "
                "--draft-vocabulary, or leave --text out"
            )
        return
    where = f"draft_vocabulary={size}"
    if size < 1:
        raise ValueError(f"{where}: must be at least 1")
    if not text:
        raise ValueError(f"{where}: its tokens are counted in a text; give conversations as --text")
    if layout not in ("hf", "native"):
        raise ValueError(f"{where}: format {layout!r} has no place for it; use 'hf' or 'native'")
    if kind is not None and kind not in _shortening():
        raise ValueError(
            f"{where}: is for heads of kind {_or(_shortening())}, not {kind!r}; leave --kind out"
        )


def _shortening() -> list[str]:
    """Returns the kinds of drafts that can get a draft vocabulary after training."""
    return [kind for kind, spec in registry.specs().items() if spec.checkpoint().shortens]


def _or(kinds: Sequence[str]) -> str:
    return " or ".join(map(repr, kinds))


def shortened(source: Source) -> str:
    """Returns the kind of the source's draft that gets the draft vocabulary."""
    kinds = [hf.kind(directory) for directory in source.drafts]
    return next((kind for kind in _shortening() if kind in kinds), _shortening()[0])


def vocabulary_of(source: Source, size: int, text: Sequence[str | Path]) -> Vocabulary:
    """Returns a draft vocabulary of the tokens that are most frequent in answers."""
    from eagle_jax.text import Tokenizer
    from eagle_jax.vocabulary import draft_vocabulary, token_counts

    where = f"draft_vocabulary={size}"
    kinds = sorted({hf.kind(directory) for directory in source.drafts})
    if kinds and not set(kinds) & set(_shortening()):
        raise ValueError(
            f"{where}: is for heads of kind {_or(_shortening())}, the source has "
            f"{', '.join(kinds)}; give such a head"
        )
    head = _choose(source, shortened(source))
    if source.target is None:
        raise ValueError(
            f"{where}: {head} has no tokenizer to count with; give its target with --target"
        )
    config, _ = hf.open_draft(head)
    hf.check_fit(hf.open_target(source.target)[0], config, head)
    own = vocabularies.size_of(config)
    if own is not None:
        raise ValueError(
            f"{where}: {head} has a draft vocabulary of {own} tokens; give the head that it was "
            "made from"
        )
    if size > config.vocab_size:
        raise ValueError(f"{where}: the target has {config.vocab_size} tokens; use fewer")
    tokenizer = Tokenizer.load(source.target)
    counts = token_counts(text, tokenizer, config.vocab_size)
    if not np.delete(counts, list(tokenizer.eos_ids)).any():
        raise ValueError(
            f"text={', '.join(map(str, text))}: has no words of an assistant; give conversations "
            "with answers"
        )
    return Vocabulary(*draft_vocabulary(counts, size, tokenizer.eos_ids, "draft_vocabulary"))


def to_hf(job: Job, source: Source, to: Path, kind: str | None) -> dict[str, Any]:
    """Writes a whole model that transformers can open; returns the summary."""
    chosen = source.target if kind is None else _choose(source, kind)
    if chosen is None or not hf.is_whole(chosen):
        draft = chosen or source.drafts[0]
        raise ValueError(
            f"{draft}: is a draft of kind {hf.kind(draft)!r}, format 'hf' is "
            f"for whole models; use one of {', '.join(FORMATS[1:])}"
        )
    with files.staged(to) as directory:
        written = _write_target(job, chosen, directory)
    return {"to": str(to), "format": "hf", "kinds": [kind or "target"], "bytes": written}


def to_draft(job: Job, source: Source, to: Path, layout: str, kind: str | None) -> dict[str, Any]:
    """Writes one draft in a layout of `export`; returns the summary."""
    draft = _choose(source, kind)
    with files.staged(to) as directory:
        config, written = _write_draft(job, draft, directory, layout, source.target)
    return {"to": str(to), "format": layout, "kinds": [config.kind], "bytes": written}


def _choose(source: Source, kind: str | None) -> Path:
    kinds = {directory: hf.kind(directory) for directory in source.drafts}
    chosen = [directory for directory in kinds if kind in (None, kinds[directory])]
    if len(chosen) == 1:
        return chosen[0]
    if not kinds:
        raise ValueError(f"{source.target}: is a target without drafts; give the draft with --from")
    have = ", ".join(sorted(set(kinds.values()))) or "none"
    if kind is None:
        raise ValueError(f"kind: the source has several drafts ({have}); choose one with --kind")
    raise ValueError(
        f"kind={kind!r}: the source has {len(chosen)} such drafts (all: {have}); give one directory"
    )


def to_native(job: Job, source: Source, to: Path) -> dict[str, Any]:
    """Writes the target and its drafts in one directory; returns the summary."""
    from eagle_jax.params import check_tokenizers

    if source.target is None:
        raise ValueError(
            f"target: format 'native' holds a target and its drafts, {source.drafts[0]} is a "
            "draft; give its target with --target"
        )
    target, _ = hf.open_target(source.target)
    parts, written = {"target": "target"}, 0
    opened = []
    for directory in source.drafts:
        config, _ = hf.open_draft(directory, target)
        hf.check_fit(target, config, directory)
        check_tokenizers(source.target, directory)
        if config.kind in parts:
            raise ValueError(
                f"{directory}: is the second draft of kind {config.kind!r}; give one of each kind"
            )
        parts[config.kind] = config.kind
        opened.append((config.kind, directory))
    with files.staged(to) as root:
        for name, directory in [("target", source.target), *opened]:
            (root / name).mkdir()
            if hf.is_whole(directory):
                written += _write_target(job, directory, root / name)
            else:
                _, count = _write_draft(job, directory, root / name, NATIVE, source.target)
                written += count
        manifest.write_manifest(root, parts)
        manifest.check(root, whole=True)
    return {"to": str(to), "format": "native", "kinds": list(parts), "bytes": written}


def _write_target(job: Job, source: Path, directory: Path) -> int:
    """Writes a target, keeping all settings of its `config.json`; returns the weights' bytes."""
    config, _ = hf.open_target(source)
    settings = json.loads((source / "config.json").read_text(encoding="utf-8"))
    settings, tensors = config_json.text_part(settings, files.read_tensors(source))
    tensors = {name: tensors[name] for name, _ in on_disk(config).values()}
    if job.dtype is not None:
        tensors = {name: cast(name, tensor, job.dtype) for name, tensor in tensors.items()}
        settings |= {"dtype": job.dtype, "torch_dtype": job.dtype}
    total = export.size(tensors)
    with job.bar(2 * total, f"{source.name} -> hf") as bar:
        safetensors.write(directory / "model.safetensors", tensors, {"format": "pt"}, bar.update)
        files.write_index(directory, tensors)
        files.write_json(directory / "config.json", settings)
        again, _ = hf.open_target(directory)
        if again != config:
            raise ValueError(f"{directory}: reads as {again}, not as {config}; please report this")
        found = safetensors.stored(directory / "model.safetensors")
        export.compare(directory, found, tensors, bar)
    _copy_others(source, directory)
    return total


def _write_draft(
    job: Job,
    source: Path,
    directory: Path,
    layout: str,
    target: Path | None,
) -> tuple[DraftConfig, int]:
    """Writes a draft in a layout of `export`; returns its configuration and the tensors' bytes."""
    about = None if target is None else _target(target, job.target_name)
    config, params = hf.open_draft(source, about.config if about else None)
    if about is not None:
        hf.check_fit(about.config, config, source)
    own = registry.by_config(config).checkpoint()
    settings = config_json.flat(files.read_json(source / "config.json"))
    if job.vocabulary is not None and own.shortens:
        config, params = own.with_vocabulary(config, params, job.vocabulary.offsets)
        settings = {**settings, **job.vocabulary.said()}
    kept = (*_KEPT, vocabularies.COVERAGE)
    matrix = _embedding(source, about, layout, config)
    if layout == "official":
        _warn(source, own.unsaid(config, about.config if about else None))
    said = export.write(
        directory,
        config,
        params,
        layout,
        job.dtype,
        target=about,
        extra={key: settings[key] for key in kept if key in settings},
        embedding=matrix,
        bar=lambda total: job.bar(total, f"{source.name} -> {job.layout}"),
    )
    size = vocabularies.size_of(config)
    if size != vocabularies.size_of(said):
        warnings.warn(
            f"{source}: format {layout!r} has no place for the draft vocabulary of "
            f"{size} tokens: the head is written without it and drafts from "
            "all there; 'native' keeps it",
            stacklevel=2,
        )
    written = export.size(files.read_tensors(directory))
    _copy_others(source, directory)
    return config, written


def _target(directory: Path, name: str | None) -> ExportTarget:
    config, params = hf.open_target(directory)
    architectures = files.read_json(directory / "config.json").get("architectures", [])
    if name is None:  # a path of this machine would mean nothing elsewhere
        place = directory.resolve()
        name = place.parent.name if place.name == "target" else place.name
    return ExportTarget(config, params["embed_tokens.embedding"], name, architectures)


def _embedding(
    source: Path, target: ExportTarget | None, layout: str, config: DraftConfig
) -> LazyTensor | None:
    """Returns the embedding to write with the draft: the target's, or else the source's own."""
    files_of_kind = registry.by_config(config).checkpoint()
    if not files_of_kind.shares_embedding(config):
        return None
    wanted, own = files_of_kind.embedding(config, layout), own_embedding(files.read_tensors(source))
    if target is not None and own is not None and not same_matrix(own, target.embedding):
        raise ValueError(
            f"{source}: its {EMBEDDING} is not the target's; "
            "give the target that the draft was trained for"
        )
    if wanted == "none":
        return None
    if wanted == "kept":
        return own if target is None else None  # kept if it was not compared with the target's
    if wanted == "required" and own is None and target is None:
        raise ValueError(
            f"{source}: has no {EMBEDDING}, without which the official code does not open "
            "an EAGLE-1 head; give the target that has it with --target"
        )
    return own if target is None else target.embedding


def _warn(source: Path, features: Sequence[str]) -> None:
    if features:
        warnings.warn(
            f"{source}: the official code knows no {', '.join(features)}: this library reads the "
            "result, the authors' drafts otherwise or not at all; other formats say it",
            stacklevel=2,
        )


def _copy_others(source: Path, directory: Path) -> None:
    for name in _OTHERS:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
