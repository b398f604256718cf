"""Checks the GPU kernels on this device: passes of the target with and without them.

    python benchmarks/check_kernels.py --shape 7b
    python benchmarks/check_kernels.py --shape 8b --quantize int8 --tensor 2

The model has two layers, random weights and caches of noise, one of them short. Passes have one
token, a few, and trees of many. The program compares logits, the ten best of them, the block's keys
and values, and the cache after a commit: those of the kernels and those of XLA in bfloat16, each
with XLA's in float32 from the same numbers. The table shows the norm of the difference over the
norm, the largest of all arrays. The exit status is 1 if in some array the kernels' error exceeds
1.5 times XLA's plus 0.001, which rounding does not explain. The kernels run on NVIDIA GPUs
(`--shape tiny` anywhere).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
import shapes
from loops import Slots

from eagle_jax import sharding
from eagle_jax.decode.top_k import likeliest
from eagle_jax.decode.tree import MC_SIM_7B_63, StaticTree, chain, static_tree
from eagle_jax.models import Transformer, bind, kernels
from eagle_jax.models import cache as caches
from eagle_jax.models.kernels import device
from eagle_jax.params import Params

_BUSHY = static_tree([[i] for i in range(10)] + [[i, j] for i in range(7) for j in range(7)])
# Rows, tree, and used slots if not `--used`: with few slots, a missed one is noticed.
_PASSES = (
    (1, StaticTree(()), None),
    (1, chain(7), 5),
    (1, chain(9), None),
    (2, MC_SIM_7B_63, 20),
    (1, _BUSHY, None),
)
_APART = 17  # the second row has this many used slots fewer
_MOST, _BESIDES = 1.5, 1e-3  # allowed error: this factor of XLA's error, plus this constant
_COMMITTED, _LOOK = 4, 16  # nodes to commit, and slots to compare from the first of them on


def exactly(tree: Any) -> Any:
    """Returns the same tree of numbers with all floats in float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, tree)


def passed(
    params: Params, slots: Slots, cache: Any, tree: StaticTree, used: int
) -> tuple[list[jax.Array], bool]:
    """Runs a pass with caches of different lengths; returns its results, and if kernels ran."""
    config, weights = params.target_config, params.target
    shape, b = tree.shape(slots.batch), slots.batch
    tokens = np.arange(b * tree.nodes, dtype=np.int32).reshape(b, -1) * 7919 % config.vocab_size
    lengths = used - _APART * np.arange(b, dtype=np.int32)
    path = np.tile(np.arange(tree.nodes, dtype=np.int32)[::-1][:_COMMITTED], (b, 1))

    @jax.jit
    def run(weights: Any, cache: Any, tokens: jax.Array, lengths: jax.Array, path: jax.Array):
        target = bind(Transformer, config, weights, params.layout)
        places = lengths[:, None] + shape.depth
        output = target(tokens, places, shape.ancestors, cache=cache, lengths=lengths)
        logits = target.logits(output.features)
        written = caches.commit(cache, output.block, path, lengths)
        near = caches.gather(written, lengths[:, None] + jnp.arange(_LOOK, dtype=jnp.int32)[None])
        found = logits, likeliest(logits, 10)[0], output.block, near
        return jax.tree.leaves(found)

    traced = run.trace(weights, cache, tokens, lengths, path)
    own = "pallas_call" in str(traced.jaxpr)
    return traced.lower().compile()(weights, cache, tokens, lengths, path), own


def distance(found: list[jax.Array], exact: list[jax.Array]) -> np.ndarray:
    """Returns the norm of the difference over the norm for every array."""
    norm = functools.partial(jnp.linalg.norm, axis=None)
    pairs = [
        (x.astype(jnp.float32).reshape(-1), y.reshape(-1))
        for x, y in zip(found, exact, strict=True)
    ]
    return np.array([norm(x - y) / norm(y) for x, y in pairs], np.float64)


def compared(
    params: Params, slots: Slots, tree: StaticTree, used: int, interpreted: bool
) -> dict[str, Any]:
    """Runs one pass in three ways and returns a row of the table; NaN counts as wrong."""
    cache = slots.new()
    device.INTERPRET = interpreted
    with kernels.decoding():
        own, ran = passed(params, slots, cache, tree, used)
    device.INTERPRET = False
    if not ran:
        raise ValueError(
            f"--tensor {1 if slots.mesh is None else slots.mesh.size}: no kernel takes a pass of "
            f"{tree.nodes} tokens, so there is nothing to compare; change it or --shape"
        )
    xla, _ = passed(params, slots, cache, tree, used)
    with jax.default_matmul_precision("highest"):  # by default GPUs round float32 to fewer bits
        whole = dataclasses.replace(params, target=exactly(params.target))
        exact, _ = passed(whole, slots, exactly(cache), tree, used)
    by_kernels, by_xla = distance(own, exact), distance(xla, exact)
    right = bool(np.all(by_kernels <= _MOST * by_xla + _BESIDES))
    row = {"rows": slots.batch, "tokens": tree.nodes, "used": used}
    return {**row, "kernels": by_kernels.max(), "xla": by_xla.max(), "right": right}


def main() -> int:
    """Checks every pass; returns 1 if one is wrong."""
    names = ("--shape", "--cache", "--used", "--quantize", "--tensor")
    args = common.parser(__doc__, *names).parse_args()
    if not _APART < args.used <= args.cache - _LOOK:
        raise ValueError(
            f"--used {args.used}: --cache {args.cache} has room for {_APART + 1} to "
            f"{args.cache - _LOOK} and a block; change one of them"
        )
    interpreted = not kernels.expected(jnp.dtype(jnp.bfloat16))
    if interpreted and args.shape != "tiny":
        raise ValueError(f"--shape {args.shape}: kernels want an NVIDIA GPU; tiny runs anywhere")
    common.default_dtype = lambda: jnp.bfloat16  # the kernels' dtype, on CPUs too
    mesh, rows = common.mesh(args.tensor), []
    device.INTERPRET = interpreted
    params = shapes.random_params(args.shape, (), args.quantize, layers=2, mesh=mesh)
    for batch, tree, used in _PASSES:
        slots = Slots(params.target_config, args.cache, batch, mesh)
        with sharding.using(mesh):
            rows.append(compared(params, slots, tree, used or args.used, interpreted))
    common.report(
        rows,
        benchmark="check_kernels",
        shape=args.shape,
        quantize=args.quantize,
        tensor=args.tensor,
        **common.environment(),
    )
    return int(not all(row["right"] for row in rows))


if __name__ == "__main__":
    common.run(main)
