"""Are the GPU kernels right on this device? A pass of the target with them and without.

    python benchmarks/agree.py --shape 7b
    python benchmarks/agree.py --shape 8b --quantize int8 --tensor 2

Two layers, random weights, caches of noise; one token, a few, and trees of many. Logits, and keys
and values of the block, by the kernels and by XLA in bfloat16, each beside XLA's in float32 with
the same numbers: the norm of the difference over the norm. Exit status 1 where the kernels are
further off than rounding explains, half again as far as XLA. They run on NVIDIA GPUs (`--shape
tiny` anywhere).
"""

from __future__ import annotations

from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
import shapes
from loops import Slots

from eagle_jax import sharding
from eagle_jax.config import TransformerConfig
from eagle_jax.decode.tree import MC_SIM_7B_63, StaticTree, chain, static_tree
from eagle_jax.models import Transformer, bind, kernels
from eagle_jax.models.kernels import device

_BUSHY = static_tree([[i] for i in range(10)] + [[i, j] for i in range(7) for j in range(7)])
_PASSES = ((1, StaticTree(())), (1, chain(7)), (1, chain(9)), (2, MC_SIM_7B_63), (1, _BUSHY))
_MOST = 1.5  # of XLA's distance from float32


def exactly(tree: Any) -> Any:
    """The same numbers, floats in float32."""
    floating = jnp.bfloat16
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == floating else x, tree)


def passed(
    config: TransformerConfig, weights: Any, slots: Slots, cache: Any, tree: StaticTree, used: int
) -> list[jax.Array]:
    """Logits, and keys and values of the nodes, after caches of unlike lengths."""
    shape, b = tree.shape(slots.batch), slots.batch
    tokens = np.arange(b * tree.nodes, dtype=np.int32).reshape(b, -1) * 7919 % config.vocab_size
    lengths = used - 17 * np.arange(b, dtype=np.int32)

    @jax.jit
    def run(weights: Any, cache: Any, tokens: jax.Array, lengths: jax.Array) -> list[jax.Array]:
        target, places = bind(Transformer, config, weights), lengths[:, None] + shape.depth
        output = target(tokens, places, shape.ancestors, cache=cache, lengths=lengths)
        return [target.logits(output.features), *jax.tree.leaves(output.block)]

    return run(weights, cache, tokens, lengths)


def distance(found: list[jax.Array], exact: list[jax.Array]) -> float:
    """The largest, over arrays, norm of the difference over the norm."""
    norms = (
        jnp.linalg.norm((x.astype(jnp.float32) - y).ravel()) / jnp.linalg.norm(y.ravel())
        for x, y in zip(found, exact, strict=True)
    )
    return max(map(float, norms))


def main() -> int:
    """Every pass three ways; 1 if one is wrong."""
    names = ("--shape", "--cache", "--used", "--quantize", "--tensor")
    args = common.parser(__doc__, *names).parse_args()
    common.default_dtype = lambda: jnp.bfloat16  # what kernels take; on CPUs too
    interpreted = args.shape == "tiny" and jax.default_backend() == "cpu"
    mesh = common.mesh(args.tensor)
    device.INTERPRET = interpreted
    params = shapes.random_params(args.shape, (), args.quantize, layers=2, mesh=mesh)
    config, rows = params.target_config, []
    with kernels.decoding():
        if not device.usable(jnp.zeros(1, jnp.bfloat16)):
            raise ValueError("no kernels here: they want an NVIDIA GPU; --shape tiny runs anywhere")
    for batch, tree in _PASSES:
        slots = Slots(config, args.cache, batch, mesh)
        cache = slots.new()
        case = (config, params.target, slots, cache, tree, args.used)
        with sharding.using(mesh):
            device.INTERPRET = interpreted
            with kernels.decoding():
                own = passed(*case)
            device.INTERPRET = False
            xla = passed(*case)
            whole = exactly(cache)
            exact = passed(config, exactly(params.target), slots, whole, tree, args.used)
        row = {"rows": batch, "tokens": tree.nodes, "kernels": distance(own, exact)}
        row["xla"] = distance(xla, exact)
        rows.append({**row, "right": row["kernels"] <= _MOST * row["xla"]})
    common.report(
        rows,
        benchmark="agree",
        shape=args.shape,
        quantize=args.quantize,
        tensor=args.tensor,
        **common.environment(),
    )
    return int(not all(row["right"] for row in rows))


if __name__ == "__main__":
    common.run(main)
