"""Compares our vanilla step with torch's: ms per token, same shape, random weights, one row.

    python benchmarks/baselines.py --shape 7b
    python benchmarks/baselines.py --shape 8b --contenders eagle-jax torch-compile --turns 3

eagle-jax            benchmarks/step.py with T = 1
torch-compile        a small Llama in plain torch with a static cache, compiled with CUDA graphs
                     (mode="reduce-overhead"), as gpt-fast does
torch-eager          the same without the compiler
transformers-eager   `generate` of transformers
transformers-static  the same with cache_implementation="static", which `generate` compiles

Every contender runs in a separate process, which frees the GPU's memory when it ends. The
contenders take turns: A B C, A B C. `--torch-python` names the interpreter that has torch and
transformers, by default this one. A contender that cannot run prints a line and is left out.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import common
import shapes

_HERE = Path(__file__).resolve().parent
OURS = "eagle-jax"
OTHERS = ("torch-compile", "torch-eager", "transformers-eager", "transformers-static")
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
_SIZES += ("num_attention_heads", "num_key_value_heads", "rope_theta", "rms_norm_eps")
_SIZES += ("max_position_embeddings",)


def command(name: str, args: Any) -> list[str]:
    """Returns the command that measures a contender."""
    shared = ["--cache", str(args.cache), "--used", str(args.used)]
    shared += ["--rounds", str(args.rounds), "--repeats", str(args.repeats)]
    if name == OURS:
        quantize = ["--quantize", args.quantize] if args.quantize else []
        step = [sys.executable, str(_HERE / "step.py"), "--shape", args.shape, "--tokens", "1"]
        return [*step, *shared, *quantize]
    sizes = dataclasses.asdict(shapes.SHAPES[args.shape])
    config = json.dumps({size: sizes[size] for size in _SIZES})
    worker = [args.torch_python, str(_HERE / "torch_worker.py"), "--kind", name]
    return [*worker, "--config", config, *shared]


def measure(name: str, args: Any) -> dict[str, Any] | None:
    """Measures a contender in one process; returns its row of figures, or None if it failed."""
    done = subprocess.run(command(name, args), capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        print(f"left out {name}: {said[-1]}", file=sys.stderr)
        return None
    result = common.last_json(done.stdout)
    return result["rows"][0] | result if name == OURS else result


def main() -> None:
    """Runs the contenders in turn."""
    names = ("--shape", "--cache", "--used", "--rounds", "--repeats", "--quantize")
    parser = common.parser(__doc__, *names)
    all_of_them = (OURS, *OTHERS)
    parser.add_argument("--contenders", nargs="+", choices=all_of_them, default=all_of_them)
    parser.add_argument("--turns", type=common.positive, default=1, help="processes of each")
    parser.add_argument("--torch-python", default=sys.executable, metavar="PATH")
    args = parser.parse_args()

    found: dict[str, list[dict[str, Any]]] = {name: [] for name in args.contenders}
    for turn in range(args.turns):
        for name in args.contenders:
            if turn and not found[name]:
                continue
            result = measure(name, args)
            found[name] += [] if result is None else [result]
            if result is not None:  # printed now, in case the program is stopped later
                print(f"{name}: {result['ms']:.4g} ms", file=sys.stderr, flush=True)
    if not any(found.values()):
        raise ValueError("no contender ran; the lines above say why")
    rows = []
    for name, results in found.items():
        ms = statistics.median(result["ms"] for result in results) if results else None
        versions = {
            package: results[0][package]
            for package in ("jax", "torch", "transformers")
            if results and package in results[0]
        }
        said = ", ".join(f"{package} {number}" for package, number in versions.items())
        pace = None if ms is None else 1e3 / ms
        rows.append({"contender": name, "ms": ms, "tokens/s": pace, "versions": said})
    ours = next((row["ms"] for row in rows if row["contender"] == OURS), None)
    for row in rows:
        row["over ours"] = row["ms"] / ours if ours and row["ms"] else None
    one = next(results[0] for results in found.values() if results)
    kept = ("shape", "cache", "used", "turns", "quantize")
    common.report(
        rows,
        benchmark="baselines",
        **{name: getattr(args, name) for name in kept},
        **{name: common.version(name) for name in ("jax", "jaxlib", "flax")},
        device=one["device"],
        driver=common.driver(),
    )


if __name__ == "__main__":
    common.run(main)
