"""The commands of `eagle-jax`: their table, and the program that runs one of them.

A command is a module with `parser(prog)` and `main(argv, prog)`. Only the requested command is
imported.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import eagle_jax
from eagle_jax import lazy

COMMANDS = {
    "generate": ("eagle_jax.commands.generate", "answer a prompt"),
    "answers": ("eagle_jax.commands.answers", "answer a file of prompts"),
    "train": ("eagle_jax.train.__main__", "train a target or a draft"),
    "evaluate": ("eagle_jax.evaluate.__main__", "compare decoding methods: speed, equal texts"),
    "tune": ("eagle_jax.tune.__main__", "find the fastest method for a model on this machine"),
    "convert": ("eagle_jax.convert", "convert or inspect checkpoints"),
    "compile": ("eagle_jax.aot.__main__", "compile for devices that are not at hand"),
}

PROGRAM = "eagle-jax"

_HELP = """\
usage: eagle-jax COMMAND [OPTIONS]

EAGLE speculative decoding in JAX: the text of vanilla decoding, in a fraction of the passes.

commands
{commands}

options
  --version            print the version
  --completion SHELL   print completions for bash or zsh
  --help               print this text; eagle-jax COMMAND --help explains a command

examples
  eagle-jax generate "Why is the sky blue?"
  eagle-jax generate "Write a haiku" --model MODEL --draft HEAD --temperature 0.7
  eagle-jax answers --input prompts.jsonl --output answers.jsonl
  eagle-jax tune --model MODEL --draft HEAD
  eagle-jax train --config configs/tiny/eagle.py --set output_dir=runs/eagle
  eval "$(eagle-jax --completion bash)"

python -m eagle_jax is the same program. Compiled programs are kept in ~/.cache/eagle_jax;
JAX_COMPILATION_CACHE_DIR names another directory, EAGLE_JAX_COMPILATION_CACHE=off keeps none.
"""


def help_text() -> str:
    """Returns the text that `eagle-jax --help` prints."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:{width}}{what}" for name, (_, what) in COMMANDS.items()]
    return _HELP.format(commands="\n".join(lines))


def module(name: str) -> Any:
    """Imports and returns the module of a command.

    Raises:
        ValueError: there is no such command; the message names the closest one.
    """
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"command {name!r}: unknown;{hint} commands: {', '.join(COMMANDS)}")
    return importlib.import_module(COMMANDS[name][0])


def main(argv: Sequence[str] | None = None) -> int | None:
    """Runs the command that `argv` names (by default the arguments of the process)."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words:
        print(help_text(), end="", file=sys.stderr)
        return 2
    first, rest = words[0], words[1:]
    if first in ("help", "--help", "-h"):
        if first == "help" and rest:
            return main([rest[0], "--help"])
        print(help_text(), end="")
        return 0
    if first in ("--version", "-V"):
        print(f"{PROGRAM} {eagle_jax.__version__}")
        return 0
    if first == "--completion":
        from eagle_jax.commands import completion

        print(completion.script(rest[0] if rest else ""), end="")
        return 0
    if first.startswith("-"):
        raise ValueError(f"option {first!r}: give a command first ({PROGRAM} --help lists them)")
    return module(first).main(rest, f"{PROGRAM} {first}")


def __getattr__(name: str) -> ModuleType:
    return lazy.submodule(__name__, name)


def __dir__() -> list[str]:
    return lazy.names(__name__)
