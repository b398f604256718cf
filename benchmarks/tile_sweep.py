"""Finds the fastest tiles for products of few rows on this GPU: µs of our kernels and of XLA.

    python benchmarks/tile_sweep.py --shape 7b
    python benchmarks/tile_sweep.py --shape 8b --rows 1 60 --quantize int8

The program measures every matrix of a layer and the head with every available tile, and reads
several copies of each matrix in turn, so that none is in the device's cache. Gate and up are one
launch of `kernels.skinny_matmul.gated`; all others are `product`. `now` is the tile that `tile`
(`gated_tile`) chooses, `best` the fastest one. Each product adds to the operand of the next one,
which costs the same for all. The result shows what could be improved in `tile`. The kernels run on
NVIDIA GPUs (`--shape tiny` anywhere, slowly).
"""

from __future__ import annotations

import functools
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import common
import jax
import jax.numpy as jnp
import shapes

from eagle_jax.models import kernels, quantize
from eagle_jax.models.kernels import device
from eagle_jax.models.kernels.skinny_matmul import Tile, gated, gated_tile, product, tile

_BYTES = 2**28  # total size of the matrices that are read in turn: more than any cache holds
_CUTS = ((128, 64), (64, 64), (64, 128), (128, 32), (128, 128), (256, 64), (32, 128), (64, 256))
_PARTS = (1, 2, 4, 8)
_GATES = "gate_up"


def matrices(shape: str) -> dict[str, tuple[int, int]]:
    """Returns inputs and outputs of each matrix, by name."""
    config = shapes.SHAPES[shape]
    d, f, e = config.hidden_size, config.intermediate_size, config.head_dim
    heads, own = config.num_attention_heads, config.num_key_value_heads
    return {
        "qkv": (d, (heads + 2 * own) * e),
        "o": (heads * e, d),
        _GATES: (d, 2 * f),
        "down": (f, d),
        "head": (d, config.vocab_size),
    }


def cuts(rows: int, width: int, columns: int, both: bool) -> Iterator[Tile]:
    """Yields the tiles that fit; for gate and up (`both`), the tiles of each of the two."""
    for (wide, step), parts, warps in itertools.product(_CUTS, (1,) if both else _PARTS, (4, 8)):
        if columns % wide == 0 and width % (step * parts) == 0:
            yield Tile(wide // (1 + both), step, parts, warps, 4 if rows <= 16 else 3)


def timed(
    multiply: Callable[[jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    all_of_them: list[jax.Array],
) -> Callable[[], float]:
    """Compiles the products; returns a function that measures the microseconds of one."""
    loops = 1 if device.INTERPRET else 20

    @jax.jit
    def run(x: jax.Array, all_of_them: list[jax.Array]) -> jax.Array:
        def body(_: jax.Array, x: jax.Array) -> jax.Array:
            for kernel in all_of_them:
                first = multiply(x, kernel).reshape(-1)[0].astype(jnp.float32)
                x = x.at[0, 0].add((first * jnp.float32(1e-30)).astype(x.dtype))
            return x

        return jax.lax.fori_loop(0, loops, body, x)

    compiled = run.lower(x, all_of_them).compile()
    jax.block_until_ready(compiled(x, all_of_them))

    def measure() -> float:
        begin = time.perf_counter()
        jax.block_until_ready(compiled(x, all_of_them))
        return 1e6 * (time.perf_counter() - begin) / loops / len(all_of_them)

    return measure


def sweep(name: str, rows: int, small: bool, args: Any) -> dict[str, Any]:
    """Measures one matrix with all tiles and returns its row."""
    (width, columns), both = matrices(args.shape)[name], name == _GATES
    size = width * columns * (1 if small else 2)
    count = 2 if device.INTERPRET else max(2, _BYTES // size)
    shape = (width, 2, columns // 2) if both else (width, columns)
    kernels_ = [shapes.draw(jax.random.key(i), shape, 0.0, 1.0, jnp.bfloat16) for i in range(count)]
    scale = None
    if small:
        kernels_, scales = zip(*map(quantize.quantize, kernels_), strict=True)
        kernels_, scale = list(kernels_), scales[0]
    x = shapes.draw(jax.random.key(99), (rows, width), 0.0, 1.0, jnp.bfloat16)

    def xla(x: jax.Array, kernel: jax.Array) -> jax.Array:
        axes = (-1, -1 if small else 0)
        return jnp.tensordot(x, kernel.astype(x.dtype), axes, preferred_element_type=jnp.float32)

    def own(x: jax.Array, kernel: jax.Array, cut: Tile) -> jax.Array:
        if both:
            return gated(x, kernel, scale, cut)
        return jnp.sum(product(x, kernel, scale, cut), axis=0)

    itemsize = 1 if small else 2
    if both:
        now = gated_tile(rows, width, columns // 2, itemsize)
    else:
        now = tile(rows, width, columns, itemsize)
    tried: list[Tile] = [] if now is None else [now]
    tried += [cut for cut in cuts(rows, width, columns, both) if cut != now]
    jobs: dict[Any, Any] = {"xla": xla, **{cut: functools.partial(own, cut=cut) for cut in tried}}
    with ThreadPoolExecutor(args.threads) as pool:
        ready = dict(
            zip(jobs, pool.map(lambda job: timed(job, x, kernels_), jobs.values()), strict=True)
        )
    us = common.interleave(ready, args.repeats)
    best = min(tried, key=lambda cut: us[cut])
    row = {
        "matrix": name,
        "rows": rows,
        "floor": size / args.copy * 1e6,
        "xla": us["xla"],
        "now": None if now is None else us[now],
        "cut": None if now is None else _said(now),
        "best": us[best],
        "best cut": _said(best),
    }
    print(json.dumps(row), file=sys.stderr, flush=True)  # now, in case the program is stopped
    return row


def _said(cut: Tile) -> str:
    return f"{cut.columns}x{cut.step} p{cut.parts} w{cut.warps}"


def swept(args: Any) -> list[dict[str, Any]]:
    """Measures every matrix with every number of rows and returns the rows of the table."""
    with kernels.decoding():
        if not device.usable(jnp.zeros((1, 64), jnp.bfloat16)):
            raise ValueError("no kernels here: they want an NVIDIA GPU; --shape tiny runs anywhere")
        if args.quantize not in (None, "int8"):
            raise ValueError(f"--quantize {args.quantize}: use int8")
        args.copy = common.copy_bandwidth()
        return [
            sweep(name, rows, args.quantize is not None, args)
            for name in matrices(args.shape)
            if args.matrices is None or name in args.matrices
            for rows in args.rows
        ]


def main() -> None:
    """Sweeps every matrix."""
    parser = common.parser(__doc__, "--shape", "--repeats", "--quantize", "--threads")
    parser.add_argument("--rows", default=[1, 10, 60], type=common.positive, nargs="+")
    parser.add_argument("--matrices", nargs="+", choices=tuple(matrices("tiny")), metavar="M")
    args = parser.parse_args()
    device.INTERPRET = args.shape == "tiny" and jax.default_backend() == "cpu"
    try:
        found = swept(args)
    finally:
        device.INTERPRET = False  # restored for later code in this process
    common.report(
        found,
        benchmark="tile_sweep",
        shape=args.shape,
        quantize=args.quantize,
        copy_GBps=args.copy / 1e9,
        **common.environment(),
    )


if __name__ == "__main__":
    common.run(main)
