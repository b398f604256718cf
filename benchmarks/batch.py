"""Measures what speculation gains at a batch size, and with which tree. SIMULATED acceptance.

    python benchmarks/batch.py --shape 7b
    python benchmarks/batch.py --shape 8b --methods eagle eagle3 --batch 8 64 --trees chain-1 best-4

Weights are random, so acceptance is SIMULATED: after the target's pass, random numbers decide for
each row which drafted tokens are accepted. Everything else runs at its real cost: draft levels,
verification, tree walk and commit (the random numbers add a few microseconds). Vanilla decoding
accepts none.

If its parent is accepted, the best candidate at depth d is accepted with the d-th of `--rates` as
probability; after r rejected siblings the next one is accepted with that rate / 2**r. The default
rates are

    eagle   .79 .74 .72 .73 .67: EAGLE-1's paper (arXiv 2401.15077), 0-alpha to 4-alpha of Vicuna 7B
            on MT-bench, temperature 0. They give the published tree (mc_sim_7b_63) a tau of 3.92
            and a chain of five 3.31; the paper measured 3.94 and 3.20.
    eagle3  .80 at eight depths: EAGLE-3's paper (2503.01840) has .78 to .81 at all of them, for
            Llama-3.1 8B on MT-bench.

`--trees` takes chain-N, mc_sim_7b_63, rank paths and best-N: the tree of N nodes (root included)
that has the highest tau with these rates, no deeper than the number of rates. Dynamic trees are
not offered, because they depend on the draft's confidence, which random weights do not give. By
default each batch size is measured with the largest trees whose pass may still cost as much as
vanilla's (docs/performance.md, Floors) and with one larger tree.

`simulated tau` is measured in the timed rounds, and `tau by rates` is its expected value. `cost` is
the time of a round over that of a vanilla round. `tokens/s` counts the tokens of all rows and uses
the expected tau, which removes sampling noise. `auto` is the fastest row of the batch size, vanilla
if no method is faster. That row is then measured again in turn with vanilla, since the best of
many noisy figures is biased upwards.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping
from typing import Any

import common
import loops
import shapes
from jax.sharding import Mesh
from loops import Rounds, Slots
from simulated import RATES, Lucky, Simulated, chances, expected, tree_of

from eagle_jax.decode import Vanilla, executables
from eagle_jax.decode.method import Method
from eagle_jax.params import Params

TREES = {"chain-2": 3, "chain-4": 5, "best-8": 8, "best-16": 16, "best-32": 32, "best-60": 60}
VANILLA = "vanilla"
_TOKENS = 320  # per pass, all rows: with more, arithmetic takes longer than reading the weights
_SIZES = 4  # number of tree sizes that are measured


def suited(batch: int) -> tuple[str, ...]:
    """Returns the largest `TREES` that suit a batch size, and the next one, which should lose.

    Smaller trees cost as much per pass and yield fewer tokens.
    """
    fitting = [name for name, nodes in TREES.items() if batch * nodes <= _TOKENS]
    end = min(len(fitting) + 1, len(TREES))
    return tuple(TREES)[max(0, end - _SIZES) : end]


def methods_of(args: Any, batch: int) -> dict[str, tuple[Method, float]]:
    """Returns the methods to measure at a batch size, each with its tau by rates."""
    found: dict[str, tuple[Method, float]] = {VANILLA: (Vanilla(), 1.0)}
    for head in args.methods:
        likely = chances(args.rates or RATES[head])
        for name in args.trees or suited(batch):
            tree = tree_of(name, likely)
            method = Lucky(tree, head, rule=Simulated(tree, likely))
            found[f"{head} {name}"] = method, expected(tree, likely)
    return found


def figures(
    jobs: Mapping[str, Rounds], rates: Mapping[str, float], repeats: int
) -> dict[str, dict[str, Any]]:
    """Returns each job's time of a round, tau and tokens/s of all rows, including vanilla's."""
    taus: dict[str, list[float]] = {name: [] for name in jobs}

    def call(name: str) -> float:
        ms = jobs[name]()
        taus[name].append(jobs[name].tau)
        return ms

    times = common.interleave({name: functools.partial(call, name) for name in jobs}, repeats)
    out: dict[str, dict[str, Any]] = {}
    for name, ms in times.items():
        pace = 1e3 * jobs[name].place.batch * rates[name] / ms
        base = out[VANILLA]["tokens/s"] if out else pace
        out[name] = {"tau by rates": rates[name], "simulated tau": statistics.mean(taus[name])}
        out[name] |= {"ms": ms, "cost": ms / times[VANILLA]}
        out[name] |= {"tokens/s": pace, "speedup": pace / base}
    return out


def measure(params: Params, batch: int, args: Any, mesh: Mesh | None) -> list[dict[str, Any]]:
    """Returns the rows of the table for a batch size."""
    place, methods = Slots(params.target_config, args.cache, batch, mesh), methods_of(args, batch)
    jobs = {
        name: Rounds(params, method, place, args.used, args.rounds, pace=tau)
        for name, (method, tau) in methods.items()
    }
    rates = {name: tau for name, (_, tau) in methods.items()}
    loops.compile_all(list(jobs.values()), place, args.threads)
    found = figures(jobs, rates, args.repeats)
    choice = max(found, key=lambda name: found[name]["tokens/s"])
    again = figures({name: jobs[name] for name in (VANILLA, choice)}, rates, args.repeats)

    def row(name: str, values: Mapping[str, Any], shown: str) -> dict[str, Any]:
        method = methods[name][0]
        first = {"batch": batch, "method": shown, "nodes": method.nodes, "depth": method.depth}
        return {**first, **values}

    rows = [row(name, values, name) for name, values in found.items()]
    return [*rows, row(choice, again[choice], "auto") | {"choice": choice}]


def main() -> None:
    """Measures one batch size after the other."""
    names = ("--shape", "--cache", "--used", "--rounds", "--repeats", "--quantize", "--threads")
    names += ("--tensor",)
    parser = common.parser(__doc__, *names)
    sizes = {"type": common.positive, "nargs": "+", "default": [1, 2, 4, 8, 16, 32]}
    parser.add_argument("--batch", help="rows decoded together", **sizes)
    parser.add_argument("--methods", nargs="+", choices=RATES, default=["eagle"], metavar="M")
    trees_said = "of each method, by default four that suit the batch size"
    parser.add_argument("--trees", nargs="+", metavar="T", help=trees_said)
    parser.add_argument(
        "--rates", nargs="+", type=common.share, metavar="A", help="SIMULATED acceptance by depth"
    )
    args = parser.parse_args()

    for batch in args.batch:
        methods_of(args, batch)  # raises now if a tree cannot be simulated
    mesh = common.mesh(args.tensor)
    params = shapes.random_params(args.shape, args.methods, args.quantize, mesh=mesh)
    print("Acceptance is SIMULATED, by rates: weights are random. The cost of rounds is real.")
    rows = []
    for batch in dict.fromkeys(args.batch):
        rows += (found := measure(params, batch, args, mesh))
        common.table(found)  # printed now, because all sizes together take minutes
        executables.forget()  # the next size compiles its own programs and needs the memory
    common.report(
        rows,
        benchmark="batch",
        acceptance="SIMULATED",
        rates={head: args.rates or RATES[head] for head in args.methods},
        **{name: getattr(args, name) for name in ("shape", "cache", "used", "quantize", "tensor")},
        **common.environment(),
    )


if __name__ == "__main__":
    common.run(main)
