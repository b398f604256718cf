"""What does speculation bring at a batch size, and which tree? SIMULATED acceptance, real rounds.

    python benchmarks/batch.py --shape 7b
    python benchmarks/batch.py --shape 8b --methods eagle eagle3 --batch 8 64 --trees chain-1 best-4

Weights are random, so acceptance is SIMULATED: after the target's pass chance decides which drafted
tokens are kept, in every row by itself. All else is done as ever, at its real cost: draft levels,
verification, walk, commit; the draws cost some microseconds more. Vanilla keeps none.

The best candidate at depth d is right with the d-th of `--rates`, given that its parent is; after r
wrong siblings the next is right with that rate / 2**r. By default the rates are

    eagle   .79 .74 .72 .73 .67: EAGLE-1's paper (arXiv 2401.15077), 0-alpha to 4-alpha of Vicuna 7B
            on MT-bench, temperature 0. They give the published tree (mc_sim_7b_63) a tau of 3.92
            and a chain of five 3.31; the paper measured 3.94 and 3.20.
    eagle3  .80 at eight depths: EAGLE-3's paper (2503.01840) has .78 to .81 at all of them, for
            Llama-3.1 8B on MT-bench.

`--trees` takes chain-N, mc_sim_7b_63, rank paths and best-N: the tree of N nodes, root included,
with the highest tau by these rates, no deeper than there are rates. Dynamic trees follow the
draft's confidence, of which random weights say nothing.

`tau by rates` is what the simulated tau tends to, `cost` the round over vanilla's, tokens/s what
all rows commit; of fewer than 8 rows more calls are timed, so that luck decides less. `auto` is
what one would choose: the fastest row of the batch size, vanilla if none is faster. The choice is
then measured again, in turn with vanilla: the largest of many figures is a lucky one, its
repetition is not.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import common
import jax.numpy as jnp
import loops
import numpy as np
import shapes
from jax import Array
from loops import Rounds, Slots

from eagle_jax.decode import Eagle, Exact, Vanilla, best_tree, engine
from eagle_jax.decode.accept import walk
from eagle_jax.decode.method import Accepted, Context, Method, Rule
from eagle_jax.decode.sampling import position_uniform
from eagle_jax.decode.tree import Proposal, StaticTree, named_tree
from eagle_jax.params import Params

RATES = {"eagle": (0.79, 0.74, 0.72, 0.73, 0.67), "eagle3": (0.80,) * 8}
TREES = ("chain-2", "chain-4", "best-8", "best-16", "best-32", "best-60")
VANILLA = "vanilla"
_RANKS = 10  # candidates of a node
_ROWS = 8  # of a turn, at least

Chances = tuple[tuple[float, ...], ...]


def chances(rates: Sequence[float]) -> Chances:
    """`[d][r]`, how often the candidate of rank r is the right one at depth d + 1, given that its
    parent is."""
    out = []
    for rate in rates:
        others = [1 - rate / 2**rank for rank in range(_RANKS)]
        out.append(tuple(math.prod(others[:r]) * (1 - others[r]) for r in range(_RANKS)))
    return tuple(out)


def tree_of(name: str, likely: Chances) -> StaticTree:
    """A tree of `--trees`, with a chance for every node."""
    size = name.removeprefix("best-")
    if size != name and size.isdecimal() and int(size) > 1:
        return best_tree(likely, int(size) - 1)
    tree = named_tree(name)
    if not isinstance(tree, StaticTree):
        raise ValueError(f"--trees {name}: a dynamic tree follows a confidence that is random here")
    if tree.depth > len(likely):
        raise ValueError(
            f"--trees {name}: is {tree.depth} deep, and there are {len(likely)} --rates; give more"
        )
    return tree


def expected(tree: StaticTree, likely: Chances) -> float:
    """The tau that the chances amount to."""
    paths = (zip(likely, path, strict=False) for path in tree.paths)
    return 1 + sum(math.prod(of_depth[rank] for of_depth, rank in path) for path in paths)


@dataclasses.dataclass(frozen=True)
class Simulated:
    """A rule by which chance decides what is kept, whatever the target says.

    Attributes:
        tree: of all proposals.
        likely: how often each candidate is right.
    """

    tree: StaticTree
    likely: Chances

    lossless: ClassVar[bool] = False
    seeded: ClassVar[bool] = False

    def __call__(
        self, proposal: Proposal, logits: Array, targets: Array, context: Context
    ) -> Accepted:
        del logits
        # A number for every position; each sibling has a stretch of 0 to 1 as long as its chance.
        depths, ranks = self.tree.depths - 1, self.tree.ranks
        ends = np.pad(np.cumsum(self.likely, axis=1, dtype=np.float32), ((0, 0), (1, 0)))
        low, high = ends[None, depths, ranks], ends[None, depths, ranks + 1]
        drawn = position_uniform(context.seeds, context.length, context.longest - 1)[:, depths]
        # No target is negative, but the compiler does not know: as with the real rule, nothing
        # can be committed before the pass has ended.
        above = jnp.take_along_axis(targets, proposal.shape.parents, 1, mode="clip")
        kept = (drawn >= low) & (drawn < high) & (above >= 0)
        return walk(proposal, kept, targets, context.longest)


@dataclasses.dataclass(frozen=True)
class Lucky(Eagle):
    """EAGLE under another rule."""

    rule: Rule = Exact()


def methods_of(args: Any) -> dict[str, tuple[Method, float]]:
    """What is measured, with its tau by rates."""
    found: dict[str, tuple[Method, float]] = {VANILLA: (Vanilla(), 1.0)}
    for head in args.methods:
        likely = chances(args.rates or RATES[head])
        for name in args.trees:
            tree = tree_of(name, likely)
            method = Lucky(tree, head, rule=Simulated(tree, likely))
            found[f"{head} {name}"] = method, expected(tree, likely)
    return found


def figures(jobs: Mapping[str, Rounds], repeats: int) -> dict[str, dict[str, Any]]:
    """Of every job, vanilla among them: time of a round, tau, tokens of all rows a second."""
    taus: dict[str, list[float]] = {name: [] for name in jobs}

    def call(name: str) -> float:
        ms = jobs[name]()
        taus[name].append(jobs[name].tau)
        return ms

    times = common.interleave({name: functools.partial(call, name) for name in jobs}, repeats)
    out: dict[str, dict[str, Any]] = {}
    for name, ms in times.items():
        tau = statistics.mean(taus[name])
        pace = 1e3 * jobs[name].place.batch * tau / ms
        base = out[VANILLA]["tokens/s"] if out else pace
        out[name] = {"ms": ms, "cost": ms / times[VANILLA], "simulated tau": tau}
        out[name] |= {"tokens/s": pace, "speedup": pace / base}
    return out


def measure(
    params: Params, methods: Mapping[str, tuple[Method, float]], batch: int, args: Any
) -> list[dict[str, Any]]:
    """The rows of a batch size."""
    place = Slots(params.target_config, args.cache, batch)
    jobs = {
        name: Rounds(params, method, place, args.used, args.rounds, pace=tau)
        for name, (method, tau) in methods.items()
    }
    loops.compile_all(list(jobs.values()), place, args.threads)
    repeats = args.repeats * -(-_ROWS // batch)
    found = figures(jobs, repeats)
    choice = max(found, key=lambda name: found[name]["tokens/s"])
    again = figures({name: jobs[name] for name in (VANILLA, choice)}, repeats)

    def row(name: str, values: Mapping[str, Any], shown: str) -> dict[str, Any]:
        method, tau = methods[name]
        first = {"batch": batch, "method": shown, "nodes": method.nodes, "depth": method.depth}
        return {**first, "tau by rates": tau, **values}

    rows = [row(name, values, name) for name, values in found.items()]
    return [*rows, row(choice, again[choice], "auto") | {"choice": choice}]


def main() -> None:
    """Measure one batch size after the other."""
    names = ("--shape", "--cache", "--used", "--rounds", "--repeats", "--quantize", "--threads")
    parser = common.parser(__doc__, *names)
    sizes = {"type": common.positive, "nargs": "+", "default": [1, 2, 4, 8, 16, 32]}
    parser.add_argument("--batch", help="rows decoded together", **sizes)
    parser.add_argument("--methods", nargs="+", choices=RATES, default=["eagle"], metavar="M")
    parser.add_argument("--trees", nargs="+", default=TREES, metavar="T", help="of each method")
    parser.add_argument(
        "--rates", nargs="+", type=common.share, metavar="A", help="SIMULATED acceptance by depth"
    )
    args = parser.parse_args()

    methods = methods_of(args)
    params = shapes.random_params(args.shape, args.methods, args.quantize)
    print("Acceptance is SIMULATED, by rates: weights are random. The cost of rounds is real.")
    rows = []
    for batch in dict.fromkeys(args.batch):
        rows += (found := measure(params, methods, batch, args))
        common.table(found)  # all of them take minutes: whoever stops has these
        engine.forget()  # the next size compiles its own, and needs the memory
    common.report(
        rows,
        benchmark="batch",
        acceptance="SIMULATED",
        rates={head: args.rates or RATES[head] for head in args.methods},
        **{name: getattr(args, name) for name in ("shape", "cache", "used", "quantize")},
        **common.environment(),
    )


if __name__ == "__main__":
    common.run(main)
