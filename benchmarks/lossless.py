"""Losslessness and acceptance over a question file: every text compared token for token.

    python benchmarks/lossless.py --questions data/mt_bench.jsonl

In float32, for greedy, temperature 1.0, and 0.7 with top-p 0.9: EAGLE with several trees against
vanilla, noise-coupled drafting against plain, and batches of four ragged prompts against single
runs, with the same seed per prompt. Prints a table, then one JSON line; exit status 1 if any text
differs.
"""

import argparse
import json
import sys
from typing import Any

import jax
import numpy as np
from questions import read_questions
from tqdm import tqdm

import eagle_jax
from eagle_jax import cli
from eagle_jax.decode import Eagle, Generation, Vanilla, chain, default_tree, generate
from eagle_jax.decode.tree import MC_SIM_7B_63

SETTINGS = ({"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9})
BATCH = 4


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    out.add_argument("--model", default="tiny")
    out.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    out.add_argument("--questions", help="JSONL with `turns`; default: a few prompts of our own")
    out.add_argument("--limit", type=int, default=80, help="first N questions")
    out.add_argument("--new-tokens", type=int, default=128)
    return out


def methods(sampled: bool) -> dict[str, Any]:
    """What is compared with vanilla."""
    out = {
        "eagle mc_sim_7b_63": Eagle(MC_SIM_7B_63),
        "eagle default tree": Eagle(default_tree()),
        "eagle chain-5": Eagle(chain(5)),
    }
    return out | ({"eagle mc_sim_7b_63 plain": Eagle(coupled=False)} if sampled else {})


def summary(name: str, runs: list[Generation], truth: list[np.ndarray]) -> dict[str, Any]:
    """Acceptance over all runs, and in how many of them the text is vanilla's."""
    tokens = [row for run in runs for row in _rows(run)]
    rounds = np.array([sum(run.statistics.rounds) for run in runs])
    depths = np.array([run.statistics.accepted_per_depth for run in runs])
    return {
        "method": name,
        "equal": sum(np.array_equal(a, b) for a, b in zip(tokens, truth, strict=True)),
        "texts": len(truth),
        "tau": sum(map(len, tokens)) / int(rounds.sum()),
        "accepted_per_depth": (rounds @ depths / rounds.sum()).tolist() if depths.size else [],
    }


def _rows(run: Generation) -> list[np.ndarray]:
    return run.tokens if isinstance(run.tokens, list) else [run.tokens]


def compare(
    params: Any, prompts: list[str], options: dict[str, float], new_tokens: int
) -> list[dict[str, Any]]:
    """All methods under one sampling setting."""
    shared = {"max_new_tokens": new_tokens, **options}

    def single(name: str, method: Any) -> list[Generation]:
        bar = tqdm(prompts, desc=f"{options} {name}", file=sys.stderr)
        return [
            generate(params, prompt, method=method, seed=index, **shared)
            for index, prompt in enumerate(bar)
        ]

    vanilla = single("vanilla", Vanilla())
    truth = [run.tokens for run in vanilla]
    rows = [summary("vanilla", vanilla, truth)]
    for name, method in methods(options["temperature"] > 0).items():
        rows.append(summary(name, single(name, method), truth))
    batches = [
        generate(params, prompts[at : at + BATCH], seed=at, method=Eagle(default_tree()), **shared)
        for at in tqdm(range(0, len(prompts), BATCH), desc=f"{options} batches", file=sys.stderr)
    ]
    rows.append(summary(f"eagle default tree, batch {BATCH}", batches, truth))
    return [{**options, **row} for row in rows]


def main() -> None:
    """Compare, print the table and the JSON line."""
    args = parser().parse_args()
    params = eagle_jax.load(args.model, dtype=args.dtype)
    prompts = read_questions(args.questions)[: args.limit]
    rows = []
    for options in SETTINGS:
        rows += compare(params, prompts, options, args.new_tokens)
    print(f"{'method':34}{'T':>5}{'top-p':>7}{'equal':>9}{'tau':>7}  accepted per depth")
    for row in rows:
        depths = " ".join(f"{share:.2f}" for share in row["accepted_per_depth"])
        equal = f"{row['equal']}/{row['texts']}"
        print(
            f"{row['method']:34}{row['temperature']:5.1f}{row.get('top_p', 1.0):7.1f}"
            f"{equal:>9}{row['tau']:7.2f}  {depths}"
        )
    lossless = all(row["equal"] == row["texts"] for row in rows)
    result = {
        "lossless": lossless,
        "model": args.model,
        "dtype": args.dtype,
        "prompts": len(prompts),
        "new_tokens": args.new_tokens,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "rows": rows,
    }
    print(json.dumps(result))
    if not lossless:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
