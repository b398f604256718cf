"""`python -m eagle_jax.decode "prompt"` streams an answer; `--input` answers a file of prompts.

The answer goes to standard output, statistics to standard error; with `--json`, one JSON line with
text and statistics is all that standard output gets.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

from eagle_jax import distributed
from eagle_jax.cli import run
from eagle_jax.decode import method_cli, registry
from eagle_jax.decode.sampling.options import add_arguments, sampling_of


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        prog="python -m eagle_jax.decode",
        description="Answer a prompt, or a file of prompts, with speculative decoding.",
        epilog='example: python -m eagle_jax.decode "What is a prime number?" --temperature 0.7',
    )
    out.add_argument("prompt", nargs="?", help="the user's message; '-' reads standard input")
    out.add_argument("--model", default="tiny", help="shipped pair or directory (default: tiny)")
    out.add_argument(
        "--draft", action="append", help="directory of another draft for the same target"
    )
    method_cli.add_arguments(out)
    out.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    out.add_argument("--raw", action="store_true", help="continue the text, no chat template")
    out.add_argument(
        "--tensor",
        type=int,
        default=0,
        metavar="N",
        help="use all devices: groups of N share the weights, groups share the rows of a batch "
        "(default: 0, one device)",
    )
    out.add_argument("--expert", type=int, default=1, metavar="N", help="groups that share experts")
    out.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: by device")
    out.add_argument(
        "--quantize", choices=("int8",), help="store the target's matrices in eight bits"
    )
    out.add_argument(
        "--quantize-drafts", choices=("int8",), help="the drafts': faster guesses, the same text"
    )
    out.add_argument(
        "--exact",
        action="store_true",
        help="the very same text from every method, in bfloat16 too (slower, for checks)",
    )
    out.add_argument("--json", action="store_true", help="print one JSON line only")
    add_arguments(out)
    files = out.add_argument_group("a file of prompts")
    files.add_argument("--input", metavar="JSONL", help="one conversation a line (plain or gzip)")
    files.add_argument("--output", metavar="JSONL", help="answered conversations; resumes")
    files.add_argument("--batch-size", type=int, default=8, metavar="N")
    files.add_argument("--limit", type=int, metavar="N", help="only the first N prompts")
    distributed.add_arguments(out)
    return out


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    args = parser().parse_args(argv)
    if (args.prompt is None) == (args.input is None):
        raise ValueError("prompt: give one, or --input FILE with --output FILE (--help explains)")
    if (args.input is None) != (args.output is None):
        raise ValueError(f"output={args.output!r}: --input and --output go together")
    if args.exact and args.input is not None:
        raise ValueError(f"input={args.input!r}: --exact is not for files; leave one of them out")

    distributed.join(args)
    from eagle_jax.params import load  # heavy; after the arguments are known to be good
    from eagle_jax.sharding import decoding_mesh

    mesh = decoding_mesh(args.tensor, args.expert)
    params = load(
        args.model,
        draft=args.draft,
        dtype=args.dtype,
        sharding=mesh,
        quantize=args.quantize,
        quantize_drafts=args.quantize_drafts,
    )
    options: dict[str, Any] = {
        "method": method_cli.method_of(args),
        "max_new_tokens": args.max_new_tokens,
        "sampling": sampling_of(args),
        "raw": args.raw,
    }
    if args.input is not None:
        from eagle_jax.decode.batching.answer_file import answer_file

        summary = answer_file(
            params,
            args.input,
            args.output,
            batch_size=args.batch_size,
            limit=args.limit,
            **options,
        )
        print(json.dumps(summary))
        return
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    _answer(params, prompt, show=not args.json, exact=args.exact, **options)


def _answer(params: Any, prompt: str, show: bool, **options: Any) -> None:
    from eagle_jax.decode import stream

    text, last, finish, logprobs = "", None, None, []
    for part in stream(params, prompt, **options):
        text, last, finish = text + (part.text or ""), part.statistics, part.finish
        logprobs += map(dataclasses.asdict, part.logprobs or ())
        if show:
            print(part.text or "", end="", flush=True)
    assert last is not None
    if not show:
        record = {"text": text, "finish": finish, **dataclasses.asdict(last)}
        print(json.dumps(record | ({"logprobs": logprobs} if logprobs else {})))
        return
    if not distributed.first():
        return
    chosen = f", auto: {last.method}" if options["method"] == registry.AUTO else ""
    print()
    print(
        f"[{sum(last.new_tokens)} tokens, {last.tokens_per_second:.1f} tokens/s, "
        f"acceptance length {last.tau:.2f} (bonus token included), {last.device}{chosen}]",
        file=sys.stderr,
    )


if __name__ == "__main__":
    run(main)
