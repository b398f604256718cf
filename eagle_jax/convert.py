"""`python -m eagle_jax.convert`: checkpoints from one layout to another, or what one is.

Every conversion is written beside its destination, read again, compared bit by bit, and only then
gets its name. Tensors pass through memory one at a time.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import shutil
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eagle_jax import cli
from eagle_jax.checkpoint import export, families, files, hf, inspection, manifest, safetensors
from eagle_jax.checkpoint.lazy_tensor import LazyTensor, cast
from eagle_jax.checkpoint.names import on_disk
from eagle_jax.config import DraftConfig
from eagle_jax.drafters import draft_vocabulary as vocabularies
from eagle_jax.drafters import registry
from eagle_jax.drafters.files import EMBEDDING, NATIVE, ExportTarget
from eagle_jax.drafters.one_layer import own_embedding, same_matrix

FORMATS = ("hf", *export.LAYOUTS, NATIVE)

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
_KEPT += ("base_model_name_or_path",)  # the published loader of Medusa heads wants it


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
    target_name: str | None = None,
    draft_vocabulary: int | None = None,
    text: Sequence[str | Path] = (),
    progress: Any = None,
) -> dict[str, Any]:
    """Writes a checkpoint in another layout.

    Args:
        source: directory of a target, of a draft, or of both (`target/` and a directory per draft),
            or the name of a shipped pair.
        to: a directory that does not exist yet, or is empty.
        layout: "hf" (a whole model, for transformers; with a draft vocabulary the draft alone, as
            `load(TARGET, draft=...)` reads it), "official", "sglang" or "speculators" (a draft),
            "native" (a target and its drafts in one directory).
        target: the draft's, where `source` has none; for "hf" only with `draft_vocabulary`.
            Official EAGLE-3 heads need it to know their layers; serving stacks want its context
            length.
        draft: further drafts; for "hf" only with `draft_vocabulary`.
        kind: which draft to write, where there are several; "model" with "hf" for an independent
            model beside a target; not for "native".
        dtype: of the weights, one of `files.DTYPES`; by default that of the source.
        target_name: under which a serving stack finds the target (speculators files say it); by
            default that of its directory.
        draft_vocabulary: so many of the target's tokens are what the EAGLE-1 head then drafts; for
            "hf" and "native". Other formats have no place for it, and a head that has one is
            written without.
        text: conversations, JSONL or JSONL.gz; the tokens that their answers have most often, and
            those that end an answer, are the draft vocabulary.
        progress: makes a progress bar from a total of bytes and a text: an object with `update`,
            in a `with` statement; for example `tqdm`.

    Returns:
        What was written: directory, format, kinds, bytes; of a draft vocabulary its size and the
            share of the answers' tokens that it has.

    Raises:
        ValueError: the source is broken or has not what the layout holds, or `to` is not empty.
        OSError: it cannot be written. Nothing half-written stays, whatever is raised.

    Warns:
        UserWarning: the authors' code does not know all of an official draft's features, or a
            format has no place for a draft vocabulary.
    """
    if layout not in FORMATS:
        raise ValueError(f"format={layout!r}: must be one of {', '.join(FORMATS)}")
    if dtype is not None and dtype not in files.DTYPES:
        raise ValueError(f"dtype={dtype!r}: must be one of {', '.join(files.DTYPES)}")
    if layout == "native" and kind is not None:
        raise ValueError(f"kind={kind!r}: format 'native' takes all drafts; leave --kind out")
    if target_name is not None and layout != "speculators":
        raise ValueError(
            f"target_name={target_name!r}: only format 'speculators' says it; leave it out"
        )
    _check_vocabulary(layout, kind, draft_vocabulary, text)
    for name, value in (("target", target), ("draft", draft)):
        if layout == "hf" and value and draft_vocabulary is None:
            raise ValueError(f"{name}: format 'hf' writes --from alone; leave --{name} out")
    to = Path(to).expanduser()
    found = _source(source, target, draft)
    if found.root is not None:
        manifest.check(found.root, whole=True)  # the new manifest would bless what is broken
    job = _Job(layout, dtype, progress, target_name)
    if draft_vocabulary is not None:
        files.check_new(to)
        job = dataclasses.replace(job, vocabulary=_vocabulary(found, draft_vocabulary, text))
    said = {} if job.vocabulary is None else job.vocabulary.said()
    if layout == "native":
        return _to_native(job, found, to) | said
    if layout == "hf" and job.vocabulary is not None:
        return _to_serving(job, found, to, NATIVE, _shortened(found)) | {"format": layout} | said
    if layout == "hf":
        return _to_hf(job, found, to, kind)
    return _to_serving(job, found, to, layout, kind)


@dataclasses.dataclass(frozen=True)
class _Vocabulary:
    """A draft vocabulary that the EAGLE-1 head gets: offsets `d2t`, and the coverage."""

    offsets: np.ndarray
    coverage: float

    def said(self) -> dict[str, Any]:
        return {"draft_vocab_size": len(self.offsets), vocabularies.COVERAGE: self.coverage}


@dataclasses.dataclass(frozen=True)
class _Job:
    layout: str
    dtype: str | None
    progress: Any
    target_name: str | None
    vocabulary: _Vocabulary | None = None

    def bar(self, total: int, text: str) -> Any:
        if self.progress is None:
            return export.NoBar()
        return self.progress(total=total, desc=text)


def _source(path: str | Path, target: str | Path | None, drafts: Sequence[str | Path]) -> Source:
    from eagle_jax.params import find, own_drafts  # imports jax

    root = find(path)
    more = [Path(directory).expanduser() for directory in drafts]
    outer = _target_of(target)
    if (root / "target").is_dir():
        if outer is not None:
            raise ValueError(f"target: {root} has a target of its own; leave --target out")
        return Source(root / "target", (*own_drafts(root), *more), root)
    if hf.is_whole(root):
        if outer is not None:  # a small model that drafts for a large one
            return Source(outer, (root, *more))
        return Source(root, tuple(more))
    return Source(outer, (root, *more))


def _target_of(path: str | Path | None) -> Path | None:
    from eagle_jax.params import find

    if path is None:
        return None
    root = find(path)
    root = root / "target" if (root / "target").is_dir() else root
    if not hf.is_whole(root):
        raise ValueError(f"target: {root} is a draft of kind {hf.kind(root)!r}; give its target")
    return root


def _check_vocabulary(
    layout: str, kind: str | None, size: int | None, text: Sequence[str | Path]
) -> None:
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
    """The kinds of drafts that can get a draft vocabulary after training."""
    return [kind for kind, spec in registry.specs().items() if spec.checkpoint().shortens]


def _or(kinds: Sequence[str]) -> str:
    return " or ".join(map(repr, kinds))


def _shortened(source: Source) -> str:
    """The kind of the source's draft that gets a draft vocabulary."""
    kinds = [hf.kind(directory) for directory in source.drafts]
    return next((kind for kind in _shortening() if kind in kinds), _shortening()[0])


def _vocabulary(source: Source, size: int, text: Sequence[str | Path]) -> _Vocabulary:
    """The tokens that answers have most often, for a draft of the source."""
    from eagle_jax.text import Tokenizer
    from eagle_jax.vocabulary import draft_vocabulary, token_counts

    where = f"draft_vocabulary={size}"
    kinds = sorted({hf.kind(directory) for directory in source.drafts})
    if kinds and not set(kinds) & set(_shortening()):
        raise ValueError(
            f"{where}: is for heads of kind {_or(_shortening())}, the source has "
            f"{', '.join(kinds)}; give such a head"
        )
    head = _choose(source, _shortened(source))
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
    return _Vocabulary(*draft_vocabulary(counts, size, tokenizer.eos_ids, "draft_vocabulary"))


def _to_hf(job: _Job, source: Source, to: Path, kind: str | None) -> dict[str, Any]:
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


def _to_serving(
    job: _Job, source: Source, to: Path, layout: str, kind: str | None
) -> dict[str, Any]:
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


def _write_target(job: _Job, source: Path, directory: Path) -> int:
    """A target with its own `config.json`, whatever else that says; returns the weights' bytes."""
    config, _ = hf.open_target(source)
    settings = json.loads((source / "config.json").read_text(encoding="utf-8"))
    settings, tensors = families.text_part(settings, files.read_tensors(source))
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
    job: _Job,
    source: Path,
    directory: Path,
    layout: str,
    target: Path | None,
) -> tuple[DraftConfig, int]:
    """A draft in a layout of `serving`; returns the bytes of its tensors."""
    about = None if target is None else _target(target, job.target_name)
    config, params = hf.open_draft(source, about.config if about else None)
    if about is not None:
        hf.check_fit(about.config, config, source)
    own = registry.by_config(config).checkpoint()
    settings = families.flat(files.read_json(source / "config.json"))
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
    if name is None:  # a path of this machine would tell others nothing
        place = directory.resolve()
        name = place.parent.name if place.name == "target" else place.name
    return ExportTarget(config, params["embed_tokens.embedding"], name, architectures)


def _embedding(
    source: Path, target: ExportTarget | None, layout: str, config: DraftConfig
) -> LazyTensor | None:
    """The matrix that goes beside the weights: the target's, or else the source's own."""
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
        return own if target is None else None  # nobody has seen that it is the target's
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
    outer = _target_of(target)
    if outer is not None and ((root / "target").is_dir() or hf.is_whole(root)):
        raise ValueError(f"target: {root} is a whole model, no head of another; leave --target out")
    if not (root / "target").is_dir():
        return {".": inspection.describe(root, outer)}
    parts = [root / "target", *own_drafts(root)]
    found = {part.name: inspection.describe(part, root / "target") for part in parts}
    listed = manifest.check(root, whole=True)
    return {**found, "manifest": "none" if listed is None else "all files as listed"}


def parser(prog: str = "python -m eagle_jax.convert") -> argparse.ArgumentParser:
    """The command line."""
    out = cli.Parser(
        prog=prog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Convert targets and drafts between layouts, or say what a checkpoint is.\n"
            "Sources: Hugging Face directories (safetensors, pytorch_model.bin; also sharded),\n"
            "EAGLE-1/2, EAGLE-3 and Medusa heads, drafts of SGLang and speculators, and pairs of\n"
            "this project. A source's layout is recognised; only the result's is named."
        ),
        epilog=(
            "formats:\n"
            "  hf           a target, or with --kind model a small one, as transformers opens it;\n"
            "               with --draft-vocabulary a draft, for load(TARGET, draft=DIRECTORY)\n"
            "  official     a draft, as the authors of EAGLE or Medusa publish it: their names of\n"
            "               tensors, in safetensors files (Medusa: medusa_lm_head.safetensors);\n"
            "               EAGLE-1 heads also as pytorch_model.bin, which their first code opens\n"
            "  sglang       a draft for SGLang (EAGLE-1, EAGLE-3)\n"
            "  speculators  a draft for vLLM (EAGLE-3)\n"
            "  native       a target with its drafts in one directory: eagle_jax.load(DIRECTORY)\n"
            "\n"
            "examples:\n"
            f"  {prog} --inspect EAGLE3-LLaMA3.1-Instruct-8B \\\n"
            "      --target Llama-3.1-8B-Instruct\n"
            f"  {prog} --from Llama-3.1-8B-Instruct \\\n"
            "      --draft EAGLE3-LLaMA3.1-Instruct-8B --to llama8b --format native\n"
            f"  {prog} --from runs/eagle3/export --target Llama-3.1-8B-Instruct"
            " \\\n"
            "      --to for-vllm --format speculators\n"
            f"  {prog} --from EAGLE-LLaMA3-Instruct-8B \\\n"
            "      --target Llama-3-8B-Instruct --to short --draft-vocabulary 16384 \\\n"
            "      --text answers.jsonl\n"
            "\n"
            "A draft vocabulary makes the steps of an EAGLE-1 head cheaper: it then scores only\n"
            "the tokens that answers in --text have most often. The target keeps all of its own,\n"
            "so texts stay the same. Of the other formats only 'native' has a place for it.\n"
            "\n"
            "Tensors pass one at a time, so memory holds the largest of them, not the model. The\n"
            "result is read again and compared before it gets its name. --to is a new directory,\n"
            "or an empty one."
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
    out.add_argument(
        "--kind", help=f"which draft, where there are several: {', '.join(registry.specs())}"
    )
    out.add_argument(
        "--target-name", metavar="NAME", help="speculators: where vLLM finds the target"
    )
    out.add_argument("--dtype", choices=files.DTYPES, help="cast weights (default: as they are)")
    out.add_argument(
        "--draft-vocabulary",
        type=int,
        metavar="N",
        help="let an EAGLE-1 head draft the N tokens that --text has most often (format: hf)",
    )
    out.add_argument(
        "--text", nargs="+", default=[], metavar="FILE", help="conversations, JSONL or JSONL.gz"
    )
    return out


def main(argv: list[str] | None = None, prog: str = "python -m eagle_jax.convert") -> None:
    """Runs the command line; the last line of standard output is one JSON object."""
    args = parser(prog).parse_args(argv)
    if args.inspect is not None:
        others = ("source", "to", "format", "draft", "kind", "dtype", "target_name")
        others += ("draft_vocabulary", "text")
        if any(getattr(args, name) for name in others):
            raise ValueError("inspect: goes with --target only, and for a draft")
        found = inspect(args.inspect, args.target)
        print(inspection.readable(found))
        print(json.dumps(found))
        return
    if args.draft_vocabulary is not None:
        args.format = args.format or "hf"
    for name, value in (("from", args.source), ("to", args.to), ("format", args.format)):
        if value is None:
            raise ValueError(f"{name}: give --{name}, or --inspect PATH (--help explains)")
    from tqdm import tqdm

    with _ended_by_sigterm(), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        summary = convert(
            args.source,
            args.to,
            args.format,
            target=args.target,
            draft=args.draft,
            kind=args.kind,
            dtype=args.dtype,
            target_name=args.target_name,
            draft_vocabulary=args.draft_vocabulary,
            text=args.text,
            progress=lambda total, desc: tqdm(
                total=total, desc=desc, unit="B", unit_scale=True, unit_divisor=1024
            ),
        )
    for warning in told:
        print(f"warning: {warning.message}", file=sys.stderr)
    if vocabularies.COVERAGE in summary:
        size, coverage = summary["draft_vocab_size"], summary[vocabularies.COVERAGE]
        print(f"draft vocabulary: {size} tokens cover {coverage:.2%} of the answers in the text")
    print(json.dumps(summary))


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Lets SIGTERM raise SystemExit, so that half-written files go, as they do after Ctrl-C."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    cli.run(main)
