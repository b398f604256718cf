"""Measures what a round of each method costs, and how long its parts take.

    python benchmarks/round.py --shape 7b
    python benchmarks/round.py --shape 8b --methods eagle3 lookahead --temperature 1
    python benchmarks/round.py --shape 8b --methods eagle2 --draft-vocabulary 16384
    python benchmarks/round.py --shape 7b --methods eagle2 eagle3 --quantize-drafts int8

Target and drafts have random weights, so `tau` is meaningless here: heads are hardly ever right,
methods that copy text often are (a random model repeats itself), and with a temperature some drafts
are accepted because of the noise that they share with the target. The cost of a round does not
depend on tau, since shapes are fixed. `cost` is the time of a round over that of a vanilla round; a
method is faster than vanilla decoding if it commits more tokens per round than that. The parts are
differences between variants of the same loop, each of which leaves out one more part:

    round                                     the method
    - draft  = the same tree without a draft  (a fixed tree of equal size and depth)
    - accept = the same without the tree walk (a rule that accepts no token)
    - commit = the target's pass alone        (nothing written)
    - verify = nothing

So draft is propose and update; verify is the pass, its head and the argmax; commit writes the cache
and the tokens. The parts add up to the round by construction; a part of a few microseconds may come
out negative.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import common
import jax.numpy as jnp
import loops
import shapes
from jax import Array
from loops import Passes, Rounds, Slots

from eagle_jax.decode import (
    DynamicTree,
    Eagle,
    Lookahead,
    Medusa,
    PromptLookup,
    Recycling,
    Speculative,
    Vanilla,
)
from eagle_jax.decode.instrument import FixedTree, WithRule
from eagle_jax.decode.method import Accepted, Context, Method
from eagle_jax.decode.tree import MC_SIM_7B_63, Proposal, StaticTree
from eagle_jax.params import Params

_EAGLE2 = DynamicTree(depth=6, k=10, drafted=59)
METHODS: dict[str, Method] = {
    "vanilla": Vanilla(),
    "eagle": Eagle(MC_SIM_7B_63),
    "eagle2": Eagle(_EAGLE2),
    "eagle3": Eagle(_EAGLE2, head="eagle3"),
    "medusa": Medusa(),
    "speculative": Speculative(5),
    "lookahead": Lookahead(5, 7, 7),
    "prompt_lookup": PromptLookup(),
    "recycling": Recycling(),
}


def fixed_tree(nodes: int, depth: int) -> StaticTree:
    """Returns a tree with a chain of `depth` nodes; all other nodes are children of the root."""
    chain = tuple((0,) * d for d in range(1, depth + 1))
    return StaticTree(tuple(sorted((*chain, *((r,) for r in range(1, nodes - depth))), key=len)))


@dataclasses.dataclass(frozen=True)
class Nothing:
    """An acceptance rule that rejects all drafted tokens and commits the root's successor."""

    lossless: ClassVar[bool] = True
    seeded: ClassVar[bool] = True

    def __call__(
        self, proposal: Proposal, logits: Array, targets: Array, context: Context
    ) -> Accepted:
        del proposal, logits
        first = jnp.broadcast_to(targets[:, :1], (targets.shape[0], context.longest))
        # All zeros, but computed from data: the compiler would write known positions differently.
        path = (first < 0).astype(jnp.int32)
        return Accepted(path, path[:, 0], first)


def jobs_of(
    params: Params, methods: dict[str, Method], make: Callable[[Method], Rounds], args: Any
) -> dict[Any, Any]:
    """Returns a job for every method and for the variants of every tree size."""
    jobs: dict[Any, Any] = {name: make(method) for name, method in methods.items()}
    place = jobs["vanilla"].place
    sizes = {(m.nodes, m.depth) for m in methods.values() if m.nodes > 1}
    for size in sorted(sizes) if not args.no_parts else ():
        tree = fixed_tree(*size)
        jobs["fixed", *size] = make(FixedTree(tree))
        jobs["bare", *size] = make(WithRule(FixedTree(tree), Nothing()))
        jobs["pass", *size] = Passes(params, tree, place, args.used, args.rounds)
    return jobs


def main() -> None:
    """Measures rounds and their parts."""
    names = ("--shape", "--batch", "--cache", "--used", "--rounds", "--repeats")
    names += ("--quantize", "--quantize-drafts", "--layers", "--threads", "--tensor")
    parser = common.parser(__doc__, *names)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="M")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--no-parts", action="store_true", help="rounds only: fewer programs")
    parser.add_argument(
        "--draft-vocabulary",
        type=common.positive,
        metavar="N",
        help="tokens that EAGLE-1's head drafts (default: all of the target's)",
    )
    args = parser.parse_args()

    methods = {name: METHODS[name] for name in dict.fromkeys(["vanilla", *args.methods])}
    kinds = sorted({m.draft for m in methods.values() if m.draft is not None})
    mesh = common.mesh(args.tensor)
    params = shapes.random_params(
        args.shape,
        kinds,
        args.quantize,
        args.draft_vocabulary,
        args.layers,
        mesh,
        args.quantize_drafts,
    )
    place = Slots(params.target_config, args.cache, args.batch, mesh)

    def make(method: Method) -> Rounds:
        return Rounds(params, method, place, args.used, args.rounds, args.temperature)

    jobs = jobs_of(params, methods, make, args)
    loops.compile_all(list(jobs.values()), place, args.threads)
    ms = common.interleave(jobs, args.repeats)
    rows = []
    for name, method in methods.items():
        size = method.nodes, method.depth
        row = {"method": name, "nodes": method.nodes, "ms": ms[name]}
        row |= {"cost": ms[name] / ms["vanilla"], "tau": jobs[name].tau}
        if ("pass", *size) in ms:
            fixed, bare, verify = (ms[kind, *size] for kind in ("fixed", "bare", "pass"))
            row |= {"draft": ms[name] - fixed, "verify": verify}
            row |= {"accept": fixed - bare, "commit": bare - verify}
        rows.append(row)
    common.report(
        rows,
        benchmark="round",
        **{name: getattr(args, name) for name in ("shape", "batch", "cache", "used", "tensor")},
        temperature=args.temperature,
        quantize=args.quantize,
        quantize_drafts=args.quantize_drafts,
        layers=args.layers,
        draft_vocabulary=args.draft_vocabulary,
        **common.environment(),
    )


if __name__ == "__main__":
    common.run(main)
