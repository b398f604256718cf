"""`python -m eagle_jax.convert`: checkpoints from one layout to another, or what one is.

Every conversion is written beside its destination, read again, compared bit by bit, and only then
gets its name. Tensors pass through memory one at a time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eagle_jax.checkpoint import drafts as layouts
from eagle_jax.checkpoint import files, hf, inspection, native, safetensors, serving
from eagle_jax.checkpoint.names import on_disk
from eagle_jax.checkpoint.stored import Stored
from eagle_jax.cli import run
from eagle_jax.config import DraftConfig, Eagle3Config

FORMATS = ("hf", *serving.LAYOUTS, "native")

# Files of a model directory besides configuration and weights.
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
# Keys that a draft keeps though they are not of its computation.
_KEPT = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")


@dataclasses.dataclass(frozen=True)
class Source:
    """What is converted: directories of a target and of drafts.

    Attributes:
        target: of the target, if there is one.
        drafts: of the drafts.
        root: of a directory that holds both, with its manifest.
    """

    target: Path | None
    drafts: tuple[Path, ...]
    root: Path | None = None


def convert(
    source: str | Path,
    to: str | Path,
    layout: str,
    *,
    target: str | Path | None = None,
    draft: Sequence[str | Path] = (),
    kind: str | None = None,
    dtype: str | None = None,
    progress: Any = None,
) -> dict[str, Any]:
    """Writes a checkpoint in another layout.

    Args:
        source: directory of a target, of a draft, or of both (`target/` and a directory per draft),
            or the name of a shipped pair.
        to: a directory that does not exist yet, or is empty.
        layout: "hf" (a target, for transformers), "official", "sglang" or "speculators" (a draft),
            "native" (a target and its drafts in one directory).
        target: the draft's, where `source` has none. Official EAGLE-3 heads need it to know their
            layers; serving stacks want its context length.
        draft: further drafts, for "native".
        kind: which draft to write, where there are several.
        dtype: of the weights, one of `files.DTYPES`; by default that of the source.
        progress: makes a progress bar from a total of bytes and a text: an object with `update`,
            in a `with` statement; for example `tqdm`.

    Returns:
        What was written: directory, format, kinds, bytes.

    Raises:
        ValueError: the source is broken or has not what the layout holds, or `to` is not empty.
        OSError: it cannot be written. Nothing half-written stays, whatever is raised.
    """
    if layout not in FORMATS:
        raise ValueError(f"format={layout!r}: must be one of {', '.join(FORMATS)}")
    if dtype is not None and dtype not in files.DTYPES:
        raise ValueError(f"dtype={dtype!r}: must be one of {', '.join(files.DTYPES)}")
    found = _source(source, target, draft)
    if found.root is not None:
        native.check(found.root)
    job = _Job(dtype, progress)
    if layout == "native":
        return _to_native(job, found, Path(to))
    if layout == "hf":
        return _to_hf(job, found, Path(to))
    return _to_serving(job, found, Path(to), layout, kind)


@dataclasses.dataclass(frozen=True)
class _Job:
    dtype: str | None
    progress: Any

    def bar(self, total: int, text: str) -> Any:
        if self.progress is None:
            return serving.NoBar()
        return self.progress(total=total, desc=text)


def _source(path: str | Path, target: str | Path | None, drafts: Sequence[str | Path]) -> Source:
    from eagle_jax.params import find, own_drafts  # imports jax

    root = find(path)
    more = [Path(directory).expanduser() for directory in drafts]
    outer = None
    if target is not None:
        outer = find(target)
        outer = outer / "target" if (outer / "target").is_dir() else outer
    if (root / "target").is_dir():
        return Source(outer or root / "target", (*own_drafts(root), *more), root)
    if _kind(root) == "model":
        if outer is not None:  # a small model that drafts for a large one
            return Source(outer, (root, *more))
        return Source(root, tuple(more))
    return Source(outer, (root, *more))


def _kind(directory: Path) -> str:
    settings = layouts.flat(files.read_json(directory / "config.json"))
    return layouts.kind_of(settings, files.read_tensors(directory))


def _to_hf(job: _Job, source: Source, to: Path) -> dict[str, Any]:
    if source.target is None:
        raise ValueError(
            f"{source.drafts[0]}: is a draft of kind {_kind(source.drafts[0])!r}, format 'hf' is "
            f"for targets; use one of {', '.join(FORMATS[1:])}"
        )
    with files.staged(to) as directory:
        written = _write_target(job, source.target, directory)
    return {"to": str(to), "format": "hf", "kinds": ["target"], "bytes": written}


def _to_serving(
    job: _Job, source: Source, to: Path, layout: str, kind: str | None
) -> dict[str, Any]:
    draft = _choose(source, kind)
    with files.staged(to) as directory:
        config, written = _write_draft(job, draft, directory, layout, source.target)
    return {"to": str(to), "format": layout, "kinds": [config.kind], "bytes": written}


def _choose(source: Source, kind: str | None) -> Path:
    kinds = {directory: _kind(directory) for directory in source.drafts}
    chosen = [directory for directory in kinds if kind in (None, kinds[directory])]
    if len(chosen) == 1:
        return chosen[0]
    have = ", ".join(sorted(set(kinds.values()))) or "none"
    if kind is None and kinds:
        raise ValueError(f"kind: the source has several drafts ({have}); choose one with --kind")
    raise ValueError(
        f"kind={kind!r}: the source has {len(chosen)} such drafts (all: {have}); give one directory"
    )


def _to_native(job: _Job, source: Source, to: Path) -> dict[str, Any]:
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
        try:
            hf.check_fit(target, config)
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from error
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
            if name in ("target", "model"):
                written += _write_target(job, directory, root / name)
            else:
                layout, own = "official", source.target
                config, count = _write_draft(
                    job, directory, root / name, layout, own, embedding=False
                )
                written += count
        native.write_manifest(root, parts)
        native.check(root, whole=True)
    return {"to": str(to), "format": "native", "kinds": list(parts), "bytes": written}


def _write_target(job: _Job, source: Path, directory: Path) -> int:
    """A target with its own `config.json`, whatever else that says; returns the weights' bytes."""
    config, _ = hf.open_target(source)
    tensors = files.read_tensors(source)
    tensors = {name: tensors[name] for name, _ in on_disk(config).values()}
    settings = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if job.dtype is not None:
        tensors = {name: tensor.astype(job.dtype) for name, tensor in tensors.items()}
        settings |= {"dtype": job.dtype, "torch_dtype": job.dtype}
    total = serving.size(tensors)
    with job.bar(2 * total, f"{source.name} -> hf") as bar:
        safetensors.write(directory / "model.safetensors", tensors, {"format": "pt"}, bar.update)
        files.write_json(directory / "config.json", settings)
        again, _ = hf.open_target(directory)
        if again != config:
            raise ValueError(f"{directory}: reads as {again}, not as {config}; please report this")
        found = safetensors.stored(directory / "model.safetensors")
        serving.compare(directory, found, tensors, bar)
    _copy_others(source, directory)
    return total


def _write_draft(
    job: _Job,
    source: Path,
    directory: Path,
    layout: str,
    target: Path | None,
    *,
    embedding: bool = True,
) -> tuple[DraftConfig, int]:
    """A draft in a layout of `serving`; returns the bytes of its tensors."""
    about = None if target is None else _target(target)
    config, params = hf.open_draft(source, about.config if about else None)
    if about is not None:
        try:
            hf.check_fit(about.config, config)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
    settings = layouts.flat(files.read_json(source / "config.json"))
    kept = (*_KEPT, layouts.COVERAGE)
    dtype = job.dtype or _dtype(source, params)
    matrix = _embedding(source, about, layout, config) if embedding else None
    serving.write(
        directory,
        config,
        params,
        layout,
        dtype,
        target=about,
        extra={key: settings[key] for key in kept if key in settings},
        embedding=matrix,
        bar=lambda total: job.bar(total, f"{source.name} -> {layout}"),
    )
    written = serving.size(files.read_tensors(directory))
    _copy_others(source, directory)
    return config, written


def _target(directory: Path) -> serving.Target:
    config, params = hf.open_target(directory)
    architectures = files.read_json(directory / "config.json").get("architectures", [])
    name = str(directory.resolve())
    return serving.Target(config, params["embed_tokens.embedding"], name, architectures)


def _embedding(
    source: Path, target: serving.Target | None, layout: str, config: DraftConfig
) -> Stored | None:
    """The matrix that goes beside the weights: the target's, or else the source's own.

    The official EAGLE-1 loader refuses heads without one; official EAGLE-3 and SGLang take the
    target's.
    """
    if layout == "sglang" or (layout == "official" and config.kind != "eagle"):
        return None
    if isinstance(config, Eagle3Config) and config.target_hidden_size:
        return None  # it has its own, among its weights
    own = files.read_tensors(source).get(layouts.EMBEDDING)
    if target is None:
        return own
    if own is not None and not _close(own, target.embedding):
        raise ValueError(
            f"{source}: its {layouts.EMBEDDING} is not the target's; "
            "give the target that the draft was trained for"
        )
    return target.embedding


def _close(own: Stored, embedding: Stored) -> bool:
    """Whether a copy is the same matrix, up to the rounding of 16-bit formats."""
    if own.shape != embedding.shape:
        return False
    one, two = np.asarray(own), np.asarray(embedding)
    for start in range(0, len(one), 1024):  # wide copies of all rows would take several times more
        rows = np.s_[start : start + 1024]
        wide, other = one[rows].astype(np.float32), two[rows].astype(np.float32)
        if np.any(np.abs(wide - other) > 0.01 * np.abs(other) + 1e-6):
            return False
    return True


def _dtype(source: Path, params: Mapping[str, Stored]) -> str:
    """The dtype of all weights, the widest where there are several."""
    names = {x.dtype.name for x in params.values() if x.dtype.kind not in "iub"}
    for name in files.DTYPES:
        if name in names:
            return name
    raise ValueError(
        f"{source}: weights are {', '.join(sorted(names))}; give --dtype, one of "
        f"{', '.join(files.DTYPES)}"
    )


def _copy_others(source: Path, directory: Path) -> None:
    for name in _OTHERS:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def inspect(path: str | Path, target: str | Path | None = None) -> dict[str, Any]:
    """What a checkpoint is, of which only headers are read.

    Args:
        path: a directory, or the name of a shipped pair.
        target: of a draft; needed for what follows from it.

    Returns:
        By the name of each part ("." for a directory that is one): kind, family, sizes, dtypes,
        parameters, bytes, vocabulary, what it lacks, and, where it cannot be loaded, why.

    Raises:
        ValueError: no checkpoint at all, or files that differ from their manifest.
    """
    from eagle_jax.params import find, own_drafts

    root = find(path)
    outer = None if target is None else _source(target, None, ()).target
    if not (root / "target").is_dir():
        return {".": inspection.describe(root, outer)}
    parts = [root / "target", *own_drafts(root)]
    found = {part.name: inspection.describe(part, root / "target") for part in parts}
    manifest = native.check(root, whole=True)
    return {**found, "manifest": "none" if manifest is None else "all files as listed"}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        prog="python -m eagle_jax.convert",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Convert targets and drafts between layouts, or say what a checkpoint is.\n"
            "Sources: Hugging Face directories (safetensors, pytorch_model.bin; also sharded),\n"
            "EAGLE-1/2, EAGLE-3 and Medusa heads, drafts of SGLang and speculators, and pairs of\n"
            "this project. A source's layout is recognised; only the result's is named."
        ),
        epilog=(
            "formats:\n"
            "  hf           a target, as transformers opens it\n"
            "  official     a draft, as the authors of EAGLE or Medusa publish it\n"
            "  sglang       a draft for SGLang (EAGLE-1, EAGLE-3)\n"
            "  speculators  a draft for vLLM (EAGLE-3)\n"
            "  native       a target with its drafts in one directory: eagle_jax.load(DIRECTORY)\n"
            "\n"
            "examples:\n"
            "  python -m eagle_jax.convert --inspect EAGLE3-LLaMA3.1-Instruct-8B\n"
            "  python -m eagle_jax.convert --from Llama-3.1-8B-Instruct \\\n"
            "      --draft EAGLE3-LLaMA3.1-Instruct-8B --to llama8b --format native\n"
            "  python -m eagle_jax.convert --from runs/eagle3/export --target Llama-3.1-8B-Instruct"
            " \\\n"
            "      --to for-vllm --format speculators\n"
            "\n"
            "Tensors pass one at a time, so memory holds the largest of them, not the model. The\n"
            "result is read again and compared before it gets its name; --to must not exist yet."
        ),
    )
    out.add_argument("--from", dest="source", metavar="PATH", help="what to convert")
    out.add_argument("--to", metavar="PATH", help="directory to make")
    out.add_argument("--format", choices=FORMATS, help="layout of the result, see below")
    out.add_argument("--inspect", metavar="PATH", help="say what a checkpoint is and what it lacks")
    out.add_argument("--target", metavar="PATH", help="the target of a draft that comes alone")
    out.add_argument(
        "--draft", action="append", default=[], metavar="PATH", help="native: a draft; repeatable"
    )
    out.add_argument("--kind", help="which draft, where there are several: eagle, eagle3, medusa")
    out.add_argument("--dtype", choices=files.DTYPES, help="cast weights (default: as they are)")
    return out


def main(argv: list[str] | None = None) -> None:
    """Run the command line; the last line of standard output is one JSON object."""
    args = parser().parse_args(argv)
    if args.inspect is not None:
        if args.source or args.to or args.format:
            raise ValueError("inspect: goes without --from, --to and --format")
        found = inspect(args.inspect, args.target)
        print(inspection.readable(found))
        print(json.dumps(found))
        return
    for name, value in (("from", args.source), ("to", args.to), ("format", args.format)):
        if value is None:
            raise ValueError(f"{name}: give --{name}, or --inspect PATH (--help explains)")
    from tqdm import tqdm

    summary = convert(
        args.source,
        args.to,
        args.format,
        target=args.target,
        draft=args.draft,
        kind=args.kind,
        dtype=args.dtype,
        progress=lambda total, desc: tqdm(
            total=total, desc=desc, unit="B", unit_scale=True, unit_divisor=1024
        ),
    )
    print(json.dumps(summary))


if __name__ == "__main__":
    run(main)
