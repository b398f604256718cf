"""`python -m eagle_jax.convert`: checkpoints from one layout to another, or what one is."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import warnings
from collections.abc import Iterator

from eagle_jax import cli
from eagle_jax.checkpoint import files, inspection
from eagle_jax.convert.conversion import FORMATS, convert, inspect
from eagle_jax.drafters import draft_vocabulary as vocabularies
from eagle_jax.drafters import registry


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
