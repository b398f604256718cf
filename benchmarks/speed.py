"""Speed and acceptance of a pair against our own vanilla loop: same prompts, interleaved, medians.

    python benchmarks/speed.py --questions data/mt_bench.jsonl

Every prompt is decoded by every method in turn (A B C, A B C, ...), after a warm-up of each shape;
a method's figure is the median over prompts and repeats of its decode seconds per token, prefill
and compilation apart. All methods emit the same texts (in float32), end tokens are obeyed. Prints a
table, then one JSON line.
"""

import argparse
import json
import statistics
import sys
from typing import Any

import jax
from questions import read_questions
from tqdm import tqdm

import eagle_jax
from eagle_jax import cli
from eagle_jax.decode import Eagle, Vanilla, default_tree, generate, named_tree
from eagle_jax.decode.tree import MC_SIM_7B_63, chain


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    out.add_argument("--model", default="tiny")
    out.add_argument("--draft", help="directory of another draft for the same target")
    out.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: by device")
    out.add_argument("--questions", help="JSONL with `turns`; default: a few prompts of our own")
    out.add_argument("--limit", type=int, default=80, help="first N questions")
    out.add_argument("--new-tokens", type=int, default=128)
    out.add_argument("--repeats", type=int, default=3)
    out.add_argument("--temperature", type=float, action="append", help="repeatable; default 0, 1")
    out.add_argument("--method", action="append", help="only these rows (and vanilla); repeatable")
    out.add_argument("--tree", action="append", default=[], help="further trees to measure")
    out.add_argument("--json", help="write the result to this file too")
    return out


def methods(args: argparse.Namespace, sampled: bool) -> dict[str, Any]:
    """What is compared, by the name of its row."""
    named: dict[str, Any] = {"vanilla": Vanilla()}
    if default_tree() != MC_SIM_7B_63:
        named["eagle default tree"] = Eagle(default_tree())
    named |= {"eagle mc_sim_7b_63": Eagle(MC_SIM_7B_63), "eagle chain-5": Eagle(chain(5))}
    if sampled:  # without noise there is nothing to couple
        named["eagle mc_sim_7b_63 plain"] = Eagle(MC_SIM_7B_63, coupled=False)
    named |= {f"eagle {name}": Eagle(named_tree(name)) for name in args.tree}
    if not args.method:
        return named
    unknown = sorted(set(args.method) - set(named) - {"eagle mc_sim_7b_63 plain"})
    if unknown:
        raise ValueError(f"method={unknown[0]!r}: unknown; use one of {', '.join(named)}")
    return {name: m for name, m in named.items() if name in {"vanilla", *args.method}}


def measure(
    params: Any, prompts: list[str], temperature: float, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row per method."""
    compared = methods(args, sampled=temperature > 0)
    samples: dict[str, list[Any]] = {name: [] for name in compared}
    total = len(prompts) * (args.repeats + 1)
    with tqdm(total=total, desc=f"temperature {temperature}", file=sys.stderr) as bar:
        for repeat in range(args.repeats + 1):
            for index, prompt in enumerate(prompts):
                for name, method in compared.items():
                    out = generate(
                        params,
                        prompt,
                        method=method,
                        max_new_tokens=args.new_tokens,
                        temperature=temperature,
                        seed=index,
                    )
                    if repeat:  # the first pass compiles every shape and warms up
                        samples[name].append(out.statistics)
                bar.update()
    baseline = statistics.median(s.decode_seconds / s.new_tokens[0] for s in samples["vanilla"])
    rows = []
    for name, runs in samples.items():
        per_token = statistics.median(s.decode_seconds / s.new_tokens[0] for s in runs)
        rounds = sum(s.rounds[0] for s in runs)
        depth = len(runs[0].accepted_per_depth)
        rows.append(
            {
                "method": name,
                "temperature": temperature,
                "tau": sum(s.new_tokens[0] for s in runs) / rounds,
                "accepted_per_depth": [
                    sum(s.accepted_per_depth[d] * s.rounds[0] for s in runs) / rounds
                    for d in range(depth)
                ],
                "round_ms": 1e3 * statistics.median(s.decode_seconds / s.rounds[0] for s in runs),
                "tokens_per_second": 1 / per_token,
                "speedup": baseline / per_token,
            }
        )
    return rows


def main() -> None:
    """Measure, print the table and the JSON line."""
    args = parser().parse_args()
    params = eagle_jax.load(args.model, draft=args.draft, dtype=args.dtype)
    prompts = read_questions(args.questions)[: args.limit]
    rows = []
    print(f"{'method':28}{'T':>5}{'tau':>7}{'round ms':>10}{'tokens/s':>10}{'speedup':>9}")
    for temperature in args.temperature or [0.0, 1.0]:
        for row in measure(params, prompts, temperature, args):
            rows.append(row)
            print(
                f"{row['method']:28}{row['temperature']:5.1f}{row['tau']:7.2f}"
                f"{row['round_ms']:10.3f}{row['tokens_per_second']:10.1f}{row['speedup']:8.2f}x",
                flush=True,
            )
    result = {
        "model": args.model,
        "draft": args.draft,
        "dtype": str(next(iter(params.target.values())).dtype),
        "prompts": len(prompts),
        "new_tokens": args.new_tokens,
        "repeats": args.repeats,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "rows": rows,
    }
    if args.json:
        with open(args.json, "w") as out:
            json.dump(result, out)
    print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main)
