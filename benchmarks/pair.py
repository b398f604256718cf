"""A trained pair: every method, wall clock, and how far EAGLE is ahead of what needs no features.

    python benchmarks/pair.py --model runs/large/model --output runs/large/evaluation \\
        --data data --set limit=10 --set longest_prompt=256 --set repeats=2
    python benchmarks/pair.py --results runs/large/evaluation/results.json

Measures with `python -m eagle_jax.evaluate`, which gets all further options (`--data`, `--tasks`,
`--temperature`, `--set`, ...) and goes on where it was stopped; `--results` reads what it left.
To its tables this adds, for every task and temperature, the best method of EAGLE-1, -2 and -3
(lookup not counted) over the best of Lookahead and of Medusa, by speedup over vanilla decoding;
lossy methods, and rules that keep only the law, are not counted.
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
    """A row for every task and temperature of an evaluation's results."""
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
    """Evaluate, unless that was done, and compare."""
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
        if status > 1:  # 1: measured, and an answer differs that must not
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
