"""Measures every method with a trained pair, and EAGLE's speedup over Lookahead and Medusa.

    python benchmarks/pair.py --model runs/large/model --output runs/large/evaluation \\
        --data data --set limit=10 --set longest_prompt=256 --set repeats=2
    python benchmarks/pair.py --results runs/large/evaluation/results.json

The program measures with `eagle-jax evaluate`, which gets all further options (`--data`, `--tasks`,
`--temperature`, `--set`, ...) and resumes if it was stopped; `--results` reads existing results. To
the tables it adds, for every task and temperature, the speedup of the best method of EAGLE-1, -2
and -3 (without lookup) over that of the best of Lookahead and of Medusa. Lossy methods, and rules
that preserve only the distribution, are not counted.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common

FAMILIES = {"eagle": "Eagle", "lookahead": "Lookahead", "medusa": "Medusa"}


def ratios(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields a row for every task and temperature of an evaluation's results."""
    classes = {name: text.partition("(")[0] for name, text in result["config"]["methods"].items()}
    rows = [row for row in result["rows"] if not row["category"] and row["guarantee"] == "exact"]
    for task, temperature in dict.fromkeys((row["task"], row["temperature"]) for row in rows):
        out: dict[str, Any] = {"task": task, "temperature": temperature}
        for family, kind in FAMILIES.items():
            own = [
                row
                for row in rows
                if (row["task"], row["temperature"]) == (task, temperature)
                and classes[row["method"]] == kind
            ]
            best = max(own, key=lambda row: row["speedup"], default=None)
            out[family] = best and best["method"]
            out[f"{family} x"] = best and best["speedup"]
        for other in ("lookahead", "medusa"):
            known = out["eagle x"] is not None and out[f"{other} x"] is not None
            out[f"over {other}"] = out["eagle x"] / out[f"{other} x"] if known else None
        yield out


def main() -> int:
    """Evaluates, unless results are given, and compares."""
    parser = common.parser(__doc__)
    parser.add_argument("--model", help="directory of the pair, or the name of a shipped one")
    parser.add_argument("--config", default=str(common.ROOT / "configs/eval/tiny.py"))
    parser.add_argument("--output", default="runs/pair", help="of the evaluation")
    parser.add_argument("--results", help="results.json of an evaluation, in place of measuring")
    args, further = parser.parse_known_args()
    if (args.model is None) == (args.results is None):
        parser.error("give --model, or --results")
    status = 0
    if args.model is not None:
        command = ["-m", "eagle_jax.evaluate", "--config", args.config, "--output", args.output]
        command += ["--set", f"model={args.model}", *further]
        status = subprocess.run([sys.executable, *command]).returncode
        if status > 1:  # 1 means: measured, but an answer differs that must be equal
            return status
    elif further:
        parser.error(f"{' '.join(further)}: --results measures nothing")
    path = Path(args.results or Path(args.output) / "results.json")
    result = json.loads(path.read_text())
    kept = ("device", "dtype", "jax", "jaxlib", "flax")
    print()
    common.report(
        list(ratios(result)),
        benchmark="pair",
        model=result["config"]["model"],
        results=str(path),
        lossless=result["lossless"],
        **{name: result["environment"][name] for name in kept},
        driver=common.driver(),
    )
    return status


if __name__ == "__main__":
    common.run(main)
