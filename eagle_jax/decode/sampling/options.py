"""Command-line options for `SamplingParams`, one per field: `--top-p 0.9 --stop END`."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from eagle_jax.decode.sampling.params import SamplingParams


def ids(text: str) -> list[int]:
    """Parses token ids that are separated by commas."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: write token ids as 1,2,3") from error


def bias(text: str) -> list[tuple[int, float]]:
    """Parses ID=VALUE into one pair of a token id and its bias."""
    token, _, value = text.partition("=")
    try:
        return [(int(token), float(value))]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: write ID=VALUE, e.g. 42=-1.5") from error


# Options that may be repeated, each with its metavar and its parser.
_SEVERAL: dict[str, tuple[str, Any]] = {
    "allowed_token_ids": ("ID,ID,...", ids),
    "bad_words": ("TEXT", lambda text: [text]),
    "logit_bias": ("ID=VALUE", bias),
    "stop": ("TEXT", lambda text: [text]),
    "stop_token_ids": ("ID,ID,...", ids),
}


def add_arguments(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Adds an option for every field of `SamplingParams`.

    Args:
        parser: the command's parser.
        **defaults: defaults of this command that differ from those of `SamplingParams`.
    """
    group = parser.add_argument_group("sampling")
    for field in dataclasses.fields(SamplingParams):
        name, help = f"--{field.name.replace('_', '-')}", field.metadata["help"]
        options: dict[str, Any] = {"default": defaults.get(field.name), "help": help}
        if field.name in defaults:
            options["help"] += f"; here {defaults[field.name]} by default"
        if isinstance(field.default, bool):
            group.add_argument(name, action="store_true", **options)
        elif field.name in _SEVERAL:
            metavar, parse = _SEVERAL[field.name]
            group.add_argument(name, action="extend", type=parse, metavar=metavar, **options)
        elif isinstance(field.default, float):
            group.add_argument(name, type=float, metavar="X", **options)
        else:
            group.add_argument(name, type=int, metavar="N", **options)


def sampling_of(args: argparse.Namespace) -> SamplingParams:
    """Returns the sampling settings that parsed options describe.

    Raises:
        ValueError: a value is invalid; one line.
    """
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(SamplingParams)}
    return SamplingParams(**{name: value for name, value in given.items() if value is not None})
