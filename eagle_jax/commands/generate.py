"""`eagle-jax generate "prompt"`: streams the answer to one prompt.

The answer goes to standard output, statistics to standard error; with `--json`, one JSON line with
text and statistics is all that standard output gets.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

from eagle_jax import cli, distributed, progress
from eagle_jax.commands import options
from eagle_jax.decode import registry

_EPILOG = """\
examples
  {prog} "Why is the sky blue?" --temperature 0.7
  {prog} "Hi" --model MODEL --draft HEAD --method eagle3
  {prog} - --json < prompt.txt
"""


def parser(prog: str) -> argparse.ArgumentParser:
    """The command line."""
    out = cli.Parser(
        prog=prog,
        description="Answer a prompt with speculative decoding.",
        epilog=_EPILOG.format(prog=prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out.add_argument("prompt", help="the user's message; '-' reads standard input")
    add_arguments(out)
    distributed.add_arguments(out)
    return out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds all options but those of several processes."""
    options.add_model(parser)
    options.add_decoding(parser)
    parser.add_argument("--raw", action="store_true", help="continue the text, no chat template")
    parser.add_argument(
        "--exact",
        action="store_true",
        help="the very same text from every method, in bfloat16 too (slower, for checks)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON line only")


def main(argv: list[str] | None = None, prog: str = "eagle-jax generate") -> None:
    """Runs the command line."""
    run(parser(prog).parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Answers `args.prompt`."""
    from eagle_jax import compilation_cache

    distributed.join(args)
    compilation_cache.enable()
    if args.json:
        progress.show(False)
    params = options.load_model(args)
    decoding = options.decoding_of(args)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    _answer(params, prompt, show=not args.json, raw=args.raw, exact=args.exact, **decoding)


def _answer(params: Any, prompt: str, show: bool, **decoding: Any) -> None:
    from eagle_jax.decode import stream

    text, last, finish, logprobs = "", None, None, []
    for part in stream(params, prompt, **decoding):
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
    chosen = f", auto: {last.method}" if decoding["method"] == registry.AUTO else ""
    print()
    print(
        f"[{sum(last.new_tokens)} tokens, {last.tokens_per_second:.1f} tokens/s, "
        f"acceptance length {last.tau:.2f} (bonus token included), {last.device}{chosen}]",
        file=sys.stderr,
    )
