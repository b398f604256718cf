"""Command line of compilation ahead of time: `eagle-jax compile --config CONFIG`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from eagle_jax import cli, settings
from eagle_jax.aot import AotConfig, compile_all

_DESCRIPTION = """\
Compile training and decoding for TPUs or GPUs that are not at hand, on the CPU.

Reports per chip: GiB of weights and state, of temporaries, of all, and the share of its memory;
GFLOP and GB moved as the compiler counts them, its estimate of the time, and a lower bound from the
chip's data sheet (weights and cache read once, or arithmetic); collectives; on GPUs the kernels
that are launched outside of loops; and whether anything crosses to the host. The table goes to
standard error; the last line of standard output is one JSON object.
"""

_EPILOG = """\
examples
  {prog} --config configs/aot/llama_8b.py
  {prog} --config configs/aot/llama_8b.py --set topology=v6e:2x4
  {prog} --config configs/aot/gpu_7b.py --set draft.quantize=int8
"""

# Maps each field of a row to its title, width and format.
_COLUMNS = {
    "program": ("program", 34, "<34"),
    "arguments": ("weights", 7, ">7.2f"),
    "temporaries": ("temp.", 7, ">7.2f"),
    "total": ("GiB", 7, ">7.2f"),
    "share": ("memory", 6, ">6.0%"),
    "gflop": ("GFLOP", 9, ">9.1f"),
    "gbytes": ("GB moved", 8, ">8.2f"),
    "milliseconds": ("ms est.", 8, ">8.2f"),
    "floor": ("floor ms", 8, ">8.3f"),
}


def _title() -> str:
    titles = [f"{title:{form[0]}{width}}" for title, width, form in _COLUMNS.values()]
    return " ".join([*titles, " collectives; host; compile time"])


def _line(row: dict[str, Any]) -> str:
    """Returns a row of the table on the console."""
    cells = [
        "-".rjust(width) if row[name] is None else f"{row[name]:{form}}"
        for name, (_, width, form) in _COLUMNS.items()
    ]
    if row["collectives"] is None:
        return f"{' '.join(cells)}  cannot be read; compiled in {row['compile']:.0f} s"
    sent = ", ".join(f"{n} {kind} {size:.1f} MiB" for kind, (n, size) in row["collectives"].items())
    host = ", ".join(row["host"]) or "no"
    kernels = f"{row['launches']} launches; " if row["launches"] is not None else ""
    seconds = f"compiled in {row['compile']:.0f} s"
    return f"{' '.join(cells)}  {sent or '-'}; {kernels}host: {host}; {seconds}"


def parser(prog: str) -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    out = cli.Parser(
        prog=prog,
        description=_DESCRIPTION,
        epilog=_EPILOG.format(prog=prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    settings.add_arguments(out, "an AotConfig file")
    return out


def main(argv: list[str] | None = None, prog: str = "python -m eagle_jax.aot") -> None:
    """Compiles the programs and prints the report; uses no cache, to measure compile times."""
    args = parser(prog).parse_args(argv)
    # Constants made while tracing stay on the CPU, and a TPU of this machine remains unused.
    os.environ["JAX_PLATFORMS"] = "cpu"
    config = settings.load(args.config, args.overrides, kind=AotConfig)
    print(_title(), file=sys.stderr)
    rows = []
    for row in compile_all(config):
        print(_line(row), file=sys.stderr, flush=True)
        rows.append(row)
    import jax

    print(json.dumps({"topology": config.topology, "jax": jax.__version__, "rows": rows}))


if __name__ == "__main__":
    cli.run(main)
