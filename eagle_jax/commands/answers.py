"""`eagle-jax answers --input FILE --output FILE`: answers a file of prompts.

The last line of standard output is one JSON object with counts and speeds.
"""

from __future__ import annotations

import argparse
import json

from eagle_jax import cli, distributed
from eagle_jax.commands import options

_EPILOG = """\
files
  --input has one conversation a line: {{"messages": [{{"role": "user", "content": "Hi"}}]}}. Each
  line of --output is the conversation with the model's answer, and "finish": "stop" or "length".
  Answers are written as they finish. The same command continues a run that was stopped.

example
  {prog} --input prompts.jsonl --output answers.jsonl --batch-size 16
"""


def parser(prog: str) -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    out = cli.Parser(
        prog=prog,
        description="Answer a file of prompts in batches, with speculative decoding.",
        epilog=_EPILOG.format(prog=prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_files(out, required=True)
    options.add_model(out)
    options.add_decoding(out)
    distributed.add_arguments(out)
    return out


def add_files(parser: argparse.ArgumentParser, required: bool) -> None:
    """Adds the options that name the files and the batch."""
    files = parser.add_argument_group("a file of prompts")
    files.add_argument(
        "--input", metavar="JSONL", required=required, help="one conversation a line (or gzip)"
    )
    files.add_argument(
        "--output", metavar="JSONL", required=required, help="answered conversations; resumes"
    )
    files.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="prompts decoded together (8)"
    )
    files.add_argument("--limit", type=int, metavar="N", help="only the first N prompts")


def main(argv: list[str] | None = None, prog: str = "eagle-jax answers") -> None:
    """Runs the command line."""
    run(parser(prog).parse_args(argv))


def run(args: argparse.Namespace, raw: bool = False) -> None:
    """Answers the prompts of `args.input` into `args.output`; `answer_file` refuses `raw`."""
    from eagle_jax import compilation_cache

    distributed.join(args)
    compilation_cache.enable()
    params = options.load_model(args)
    decoding = options.decoding_of(args)
    from eagle_jax.decode.batching.answer_file import answer_file

    summary = answer_file(
        params,
        args.input,
        args.output,
        batch_size=args.batch_size,
        limit=args.limit,
        raw=raw,
        **decoding,
    )
    print(json.dumps(summary))
