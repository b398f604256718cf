"""Options that several commands share, with the same names and meanings in all of them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eagle_jax.params import Params


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `load_model`: which model, in what precision, on which devices."""
    parser.add_argument("--model", default="tiny", help="shipped pair or directory (default: tiny)")
    parser.add_argument(
        "--draft",
        action="append",
        metavar="DIR",
        help="directory of another draft for the same target; repeatable",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: by device")
    parser.add_argument(
        "--quantize", choices=("int8",), help="store the target's matrices in eight bits"
    )
    parser.add_argument(
        "--quantize-drafts", choices=("int8",), help="the drafts': faster guesses, the same text"
    )
    parser.add_argument(
        "--tensor",
        type=int,
        default=0,
        metavar="N",
        help="use all devices: groups of N share the weights, groups share the rows of a batch "
        "(default: 0, one device)",
    )
    parser.add_argument(
        "--expert", type=int, default=1, metavar="N", help="groups that share experts"
    )


def load_model(args: argparse.Namespace) -> Params:
    """Loads the model that the options of `add_model` name."""
    from eagle_jax.params import load  # slow to import, so only after the arguments are parsed
    from eagle_jax.sharding import decoding_mesh

    return load(
        args.model,
        draft=args.draft,
        dtype=args.dtype,
        sharding=decoding_mesh(args.tensor, args.expert),
        quantize=args.quantize,
        quantize_drafts=args.quantize_drafts,
    )


def add_decoding(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the decoding method, of sampling and of the answer."""
    from eagle_jax.decode import method_cli
    from eagle_jax.decode.sampling import options as sampling

    method_cli.add_arguments(parser)
    parser.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (256)"
    )
    sampling.add_arguments(parser)


def decoding_of(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the keyword arguments for `generate` from the options of `add_decoding`."""
    from eagle_jax.decode import method_cli
    from eagle_jax.decode.sampling import options as sampling

    return {
        "method": method_cli.method_of(args),
        "max_new_tokens": args.max_new_tokens,
        "sampling": sampling.sampling_of(args),
    }
