"""Compares draft trees on this machine: acceptance length and speed for one prompt.

    python decode/compare_trees.py chain-1 chain-3 "0 1 2" "0 1 00 01" mc_sim_7b_63

A tree is a name or a list of rank paths: `0 1 00` is the best and the second best next token and,
below the best one, its best successor. A larger tree commits more tokens per pass, but drafting
takes one step per level, and the target's pass takes longer with more nodes, so the best tree
depends on the machine.
"""

import argparse
import statistics

import jax

import eagle_jax
from eagle_jax import cli
from eagle_jax.decode import Eagle, Vanilla, generate, named_tree

PROMPT = "Explain in a few sentences how plants make sugar from light."
TREES = ["chain-1", "chain-3", "0 1 2", "0 1 2 00 01 10", "mc_sim_7b_63"]


def main():
    """Decodes with every tree in turn, then prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trees", nargs="*", default=TREES)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--model", default="tiny", help="shipped pair or directory")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    params = eagle_jax.load(args.model)

    # Methods are small frozen dataclasses; equal ones share a compiled program.
    methods = {"vanilla": Vanilla()} | {name: Eagle(named_tree(name)) for name in args.trees}
    runs = {name: [] for name in methods}
    for repeat in range(args.repeats + 1):
        # Methods alternate, so that a machine that slows down slows all of them alike.
        for name, method in methods.items():
            out = generate(
                params,
                args.prompt,
                method=method,
                temperature=args.temperature,
                max_new_tokens=args.max_new_tokens,
                ignore_eos=True,  # so that all runs generate the same number of tokens
            )
            if repeat:  # the first round compiles and warms up
                runs[name].append(out.statistics)

    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    print(f"{'tree':24}{'nodes':>6}{'depth':>6}{'tau':>7}{'ms/pass':>9}{'tokens/s':>10}{'':3}gain")
    times = {name: statistics.median(s.decode_seconds for s in runs[name]) for name in runs}
    for name, method in methods.items():
        last, seconds = runs[name][-1], times[name]
        # tau is the mean acceptance length: tokens committed per target pass, including the
        # target's own ("bonus") token. Speedup = tau x (time of a vanilla pass / of a tree pass).
        print(
            f"{name:24}{method.nodes:6}{method.depth:6}{last.tau:7.2f}"
            f"{1e3 * seconds / last.rounds[0]:9.2f}{last.new_tokens[0] / seconds:10.1f}"
            f"{times['vanilla'] / seconds:6.2f}x"
        )
    best = min(times, key=times.__getitem__)
    print(f"fastest: {best}")


if __name__ == "__main__":
    cli.run(main)
