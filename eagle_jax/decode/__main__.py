"""`python -m eagle_jax.decode "prompt"` streams an answer; `--input` answers a file of prompts.

It combines `eagle-jax generate` and `eagle-jax answers`.
"""

from __future__ import annotations

import argparse

from eagle_jax import cli, distributed
from eagle_jax.commands import answers, generate


def parser(prog: str = "python -m eagle_jax.decode") -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    out = cli.Parser(
        prog=prog,
        description="Answer a prompt, or a file of prompts, with speculative decoding.",
        epilog=f'example: {prog} "Why is the sky blue?" --temperature 0.7',
    )
    out.add_argument("prompt", nargs="?", help="the user's message; '-' reads standard input")
    generate.add_arguments(out)
    answers.add_files(out, required=False)
    distributed.add_arguments(out)
    return out


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    args = parser().parse_args(argv)
    if (args.prompt is None) == (args.input is None):
        raise ValueError("prompt: give one, or --input FILE with --output FILE (--help explains)")
    if (args.input is None) != (args.output is None):
        raise ValueError(f"output={args.output!r}: --input and --output go together")
    if args.exact and args.input is not None:
        raise ValueError(f"input={args.input!r}: --exact is not for files; leave one of them out")
    if args.input is not None:
        answers.run(args, raw=args.raw)
    else:
        generate.run(args)


if __name__ == "__main__":
    cli.run(main)
