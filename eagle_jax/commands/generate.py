"""`eagle-jax generate "prompt"`: streams the answer to one prompt.

The answer goes to standard output and statistics go to standard error. With `--json`, standard
output gets only one JSON line with text and statistics.
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
    """Returns the parser of the command line."""
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
    """Adds all options except those for several processes."""
    options.add_model(parser)
    options.add_decoding(parser)
    parser.add_argument("--raw", action="store_true", help="continue the text, no chat template")
    parser.add_argument(
        "--exact",
        action="store_true",
        help="the very same text from every method, in bfloat16 too (slower, for checks)",
    )
    parser.add_argument(
        "--color",
        action="store_true",
        help="show on a background what the draft guessed and the target accepted",
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
    if args.logprobs is not None and not args.json:
        raise ValueError(f"logprobs={args.logprobs}: only --json shows them; add --json")
    if args.json:
        progress.show(False)
        if args.color:
            raise ValueError("color: --json has no colours; leave one of them out")
    params = options.load_model(args)
    decoding = options.decoding_of(args)
    decoding |= {"raw": args.raw, "exact": args.exact}
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    if args.json:
        _print_json(params, prompt, decoding)
    else:
        _print_text(params, prompt, decoding, args.color)


def _print_text(params: Any, prompt: str, decoding: dict[str, Any], color: bool) -> None:
    """Prints the answer as it is generated, then a line of statistics on standard error."""
    from eagle_jax.decode import display, stream

    last = None
    marks = display.Marks(params.tokenizer) if color and params.tokenizer is not None else None
    for part in stream(params, prompt, **decoding):
        last, text = part.statistics, part.text or ""
        if marks is not None:
            text = display.ansi(marks.runs(text, part.tokens, part.drafted))
        print(text, end="", flush=True)
    assert last is not None
    if not distributed.first():
        return
    chosen = f", auto: {last.method}" if decoding["method"] == registry.AUTO else ""
    print()
    print(
        f"[{sum(last.new_tokens)} tokens, {last.tokens_per_second:.1f} tokens/s, "
        f"acceptance length {last.tau:.2f} (bonus token included), {last.device}{chosen}]",
        file=sys.stderr,
    )


def _print_json(params: Any, prompt: str, decoding: dict[str, Any]) -> None:
    """Prints one JSON line with text, statistics and, if requested, log-probabilities."""
    from eagle_jax.decode import generate

    out = generate(params, prompt, **decoding)
    record = {"text": out.text or "", "finish": out.finish, **dataclasses.asdict(out.statistics)}
    if out.logprobs:
        record["logprobs"] = [dataclasses.asdict(found) for found in out.logprobs]
    print(json.dumps(record))
