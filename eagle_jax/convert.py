"""`eagle-jax convert`: converts checkpoints between layouts, and describes them.

A conversion is written beside its destination, read back and compared bit by bit; only then is it
renamed. Only one tensor at a time is in memory.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from eagle_jax import cli
from eagle_jax.checkpoint import conversion, files, hf, inspection, manifest
from eagle_jax.checkpoint.conversion import FORMATS
from eagle_jax.drafters import draft_vocabulary as vocabularies
from eagle_jax.drafters import registry
from eagle_jax.drafters.files import NATIVE


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
    """Writes a checkpoint in another layout and returns a summary.

    Args:
        source: directory of a target, of a draft, or of both (`target/` and one directory per
            draft), or the name of a shipped model.
        to: a directory that does not exist yet or is empty.
        layout: "hf" (a whole model, for transformers; with `draft_vocabulary` only the draft, as
            `load(TARGET, draft=...)` reads it), "official", "sglang" or "speculators" (a draft), or
            "native" (a target and its drafts in one directory).
        target: the draft's target, if `source` has none; for "hf" only with `draft_vocabulary`.
            Official EAGLE-3 heads need it to derive which layers they read, serving stacks for its
            context length.
        draft: directories of further drafts; for "hf" only with `draft_vocabulary`.
        kind: kind of the draft to write if there are several; "model" with "hf" writes an
            independent model that lies beside a target. Not for "native".
        dtype: dtype of the weights, one of `files.DTYPES`; by default the source's.
        target_name: name of the target in the files for speculators; by default the name of its
            directory.
        draft_vocabulary: number of tokens that the EAGLE-1 head can draft after the conversion; for
            "hf" and "native". The other layouts cannot store a draft vocabulary and write the head
            without it.
        text: JSONL or JSONL.gz files of conversations. The draft vocabulary consists of the most
            frequent tokens of their answers and the tokens that end an answer.
        progress: makes a progress bar from a number of bytes and a label: a context manager whose
            value has `update`, for example `tqdm`.

    Returns:
        The directory, layout, kinds and bytes written; for a draft vocabulary also its size and
            coverage (the share of the answers' tokens that are in it).

    Raises:
        ValueError: the source is broken or lacks a part that the layout needs, or `to` is not
            empty.
        OSError: the files cannot be written. After any error nothing half-written remains.

    Warns:
        UserWarning: the official code does not support a feature of the draft, or the layout cannot
            store a draft vocabulary.
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
    conversion.check_vocabulary(layout, kind, draft_vocabulary, text)
    for name, value in (("target", target), ("draft", draft)):
        if layout == "hf" and value and draft_vocabulary is None:
            raise ValueError(f"{name}: format 'hf' writes --from alone; leave --{name} out")
    to = Path(to).expanduser()
    found = conversion.source_of(source, target, draft)
    if found.root is not None:
        manifest.check(found.root, whole=True)  # else the new manifest would list broken files
    job = conversion.Job(layout, dtype, progress, target_name)
    if draft_vocabulary is not None:
        files.check_new(to)
        made = conversion.vocabulary_of(found, draft_vocabulary, text)
        job = dataclasses.replace(job, vocabulary=made)
    said = {} if job.vocabulary is None else job.vocabulary.said()
    if layout == "native":
        return conversion.to_native(job, found, to) | said
    if layout == "hf" and job.vocabulary is not None:
        own = conversion.shortened(found)
        return conversion.to_draft(job, found, to, NATIVE, own) | {"format": layout} | said
    if layout == "hf":
        return conversion.to_hf(job, found, to, kind)
    return conversion.to_draft(job, found, to, layout, kind)


def inspect(path: str | Path, target: str | Path | None = None) -> dict[str, Any]:
    """Returns a description of a checkpoint.

    It reads only the headers of the weights, unless a manifest lists checksums to compare.

    Args:
        path: a directory, or the name of a shipped model.
        target: directory of the target, if `path` is a draft whose architecture depends on it.

    Returns:
        For each part, by name ("." if the directory itself is one): kind, family, sizes, dtypes,
        parameters, bytes, vocabulary, missing optional parts, and why it cannot be loaded, if so.

    Raises:
        ValueError: there is no checkpoint, or files differ from their manifest.
    """
    from eagle_jax.params import find, own_drafts

    root = find(path)
    outer = conversion.target_of(target)
    if outer is not None and ((root / "target").is_dir() or hf.is_whole(root)):
        raise ValueError(f"target: {root} is a whole model, no head of another; leave --target out")
    if not (root / "target").is_dir():
        return {".": inspection.describe(root, outer)}
    parts = [root / "target", *own_drafts(root)]
    found = {part.name: inspection.describe(part, root / "target") for part in parts}
    listed = manifest.check(root, whole=True)
    return {**found, "manifest": "none" if listed is None else "all files as listed"}


def parser(prog: str = "python -m eagle_jax.convert") -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
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
            "  hf           a target, or with --kind model a small one, as transformers opens it,\n"
            "               with the index in which the official EAGLE code finds its embedding;\n"
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
    """Lets SIGTERM raise SystemExit, so that half-written files are removed, as after Ctrl-C."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    cli.run(main)
