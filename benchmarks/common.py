"""Code that all benchmarks share: command line, medians of interleaved runs, report."""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

# A 13B model and its caches need most of 80 GB, of which JAX reserves only 75 % by default.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from eagle_jax import cli, sharding

ROOT = Path(__file__).resolve().parent.parent
SHAPES = ("tiny", "1b", "7b", "8b", "13b", "70b")
_COPIES = 16  # copies of the buffer that are timed together


def default_dtype() -> Any:
    """Returns the dtype of weights and arithmetic: bfloat16, on CPUs float32."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def interleave(jobs: Mapping[Any, Callable[[], float]], repeats: int) -> dict[Any, float]:
    """Runs jobs in turn (A B C, A B C, ...) after a warm-up; returns the median of each."""
    found: dict[Any, list[float]] = {name: [] for name in jobs}
    for turn in tqdm(range(repeats + 1), "measuring", file=sys.stderr):
        for name, job in jobs.items():
            value = job()
            if turn:
                found[name].append(value)
    return {name: statistics.median(values) for name, values in found.items()}


def copy_bandwidth(repeats: int = 9) -> float:
    """Returns the median bytes/s, read plus written, of copies of a large buffer."""
    size = 2**22 if jax.default_backend() == "cpu" else 2**29  # numbers of four bytes

    @functools.partial(jax.jit, donate_argnums=0)
    def copies(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, _COPIES, lambda i, x: x ^ i, x)

    x, seconds = copies(jnp.arange(size, dtype=jnp.int32)), []
    for _ in range(repeats):
        jax.block_until_ready(x)
        begin = time.perf_counter()
        x = jax.block_until_ready(copies(x))
        seconds.append(time.perf_counter() - begin)
    return 2 * x.nbytes * _COPIES / statistics.median(seconds)


# --- Command line and report -------------------------------------------------------------------


def positive(text: str) -> int:
    """Returns a whole number above 0, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number above 0")
    return int(text)


def share(text: str) -> float:
    """Returns a number from 0 to 1, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number from 0 to 1")
    return value


def parser(doc: str | None, *names: str) -> argparse.ArgumentParser:
    """Returns a parser whose help is the program's docstring, with the named shared options."""
    out = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shared: dict[str, dict[str, Any]] = {
        "--shape": {"choices": SHAPES, "default": "7b", "help": "of the target"},
        "--batch": {"type": positive, "default": 1, "help": "rows decoded together"},
        "--cache": {"type": positive, "default": 1024, "help": "allocated slots"},
        "--used": {"type": positive, "default": 512, "help": "slots with tokens"},
        "--rounds": {"type": positive, "default": 32, "help": "rounds of one timed call"},
        "--repeats": {"type": positive, "default": 5, "help": "timed calls; medians are taken"},
        "--quantize": {"help": "int8, the target's matrices"},
        "--quantize-drafts": {"help": "int8, the drafts' matrices"},
        "--layers": {"type": positive, "help": "of the target (default: all)"},
        "--tensor": {"type": positive, "default": 1, "help": "devices that share the model"},
        "--threads": {"type": positive, "default": 4, "help": "programs compiled at a time"},
    }
    for name in names:
        out.add_argument(name, **shared[name])
    return out


def mesh(tensor: int) -> Mesh | None:
    """Returns a mesh of `tensor` devices in one tensor group, or None for one device.

    Raises:
        ValueError: there are fewer devices.
    """
    devices = jax.devices()
    if tensor > len(devices):
        raise ValueError(f"--tensor {tensor}: there are {len(devices)} devices; use fewer")
    return None if tensor == 1 else sharding.make_mesh(tensor=tensor, devices=devices[:tensor])


def environment() -> dict[str, Any]:
    """Returns the names of device and software with their versions."""
    names = ("jax", "jaxlib", "flax")
    return {
        "device": jax.devices()[0].device_kind,
        "dtype": np.dtype(default_dtype()).name,
        **{name: version(name) for name in names},
        "driver": driver(),
    }


def driver() -> str | None:
    """Returns the version of the NVIDIA driver, or None if there is none."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split("\n")[0].strip() or None


def report(rows: Sequence[Mapping[str, Any]], **more: Any) -> None:
    """Prints rows as a table, then rows and `more` as one line of JSON."""
    table(rows)
    print(json.dumps({**more, "rows": list(rows)}), flush=True)


def table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints rows as a table with the names of their fields as header."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([_cell(row.get(name)) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))
    sys.stdout.flush()


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def last_json(text: str) -> dict[str, Any]:
    """Returns the JSON object in the last line of a program's output."""
    return json.loads(text.strip().splitlines()[-1])


def run(main: Callable[[], int | None]) -> NoReturn:
    """Runs `main` like `cli.run`; a device's error (mostly out of memory) becomes one line too."""

    def guarded() -> int | None:
        try:
            return main()
        except jax.errors.JaxRuntimeError as error:
            raise ValueError(str(error).strip().splitlines()[0]) from error

    cli.run(guarded)
