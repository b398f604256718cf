"""Runs the benchmarks of docs/performance.md in turn; a second run skips those that are done.

    python benchmarks/suite.py
    python benchmarks/suite.py --set two-gpus --minutes 25 --output runs/two

Each command runs in a process with its own time limit, at which it is stopped together with all
processes that it started. The directory `--output` gets its output (NAME.out, NAME.err) and a line
in results.jsonl: name, command, status, seconds and the JSON of its last line. The same command
again runs what is not done: benchmarks that failed, exceeded their limit, or were skipped because
the limit was longer than the rest of `--minutes`. All benchmarks share one cache of compiled
programs, JAX_COMPILATION_CACHE_DIR, which by default lies in `--output`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import common

# Name, time limit in seconds, and a program of this folder; the most important come first.
SETS = {
    "one-gpu": """
        step        120 step.py --shape 7b --cache 1024 --tokens 1 8 60
        round       180 round.py --shape 7b --methods eagle eagle2 eagle3 --no-parts
        round-int8 180 round.py --shape 7b --methods eagle2 eagle3 --quantize-drafts int8 --no-parts
        round-8192  120 round.py --shape 7b --methods eagle2 --draft-vocabulary 8192 --no-parts
        step-int8   120 step.py --shape 7b --cache 1024 --tokens 1 8 60 --quantize int8
        step-long   150 step.py --shape 7b --cache 16384 --used 512 15800 --tokens 1 60
        train       240 train.py --shape 7b --batch 4 --attention cudnn
        batch       420 batch.py --shape 7b --batch 1 2 4 8 16 32 --threads 8
        baselines   300 baselines.py --shape 7b --contenders eagle-jax torch-compile
        transformers 420 baselines.py --shape 7b --contenders eagle-jax transformers-static \
            transformers-eager torch-eager
        round-parts 420 round.py --shape 7b --threads 8
        round-8b    180 round.py --shape 8b --methods eagle2 eagle3 --no-parts
        8b-int8 180 round.py --shape 8b --methods eagle2 eagle3 --quantize-drafts int8 --no-parts
    """,
    "two-gpus": """
        step-70b    300 step.py --shape 70b --cache 1024 --tokens 1 60 --tensor 2
        round-70b   420 round.py --shape 70b --methods eagle2 eagle3 --no-parts --tensor 2
        step-8b-1   120 step.py --shape 8b --cache 1024 --tokens 1 60 --tensor 1
        step-8b-2   150 step.py --shape 8b --cache 1024 --tokens 1 60 --tensor 2
        round-8b-1  180 round.py --shape 8b --methods eagle2 eagle3 --no-parts --tensor 1
        round-8b-2  210 round.py --shape 8b --methods eagle2 eagle3 --no-parts --tensor 2
    """,
    "tiny": """
        step  120 step.py --shape tiny --cache 64 --used 30 --rounds 4 --tokens 1
        train 120 train.py --shape tiny --sequence 16 --steps 1 --objectives eagle
    """,
}


def share_cache(output: Path) -> None:
    """Makes all commands share one cache of compiled programs, including small ones."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(output / "cache"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and all that it started: asks them to end, waits, then kills them."""
    for number, seconds in ((signal.SIGTERM, 10), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):  # all have ended
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)


def execute(name: str, limit: float, command: str, output: Path) -> dict[str, Any]:
    """Runs a command for at most `limit` seconds and returns its entry for results.jsonl."""
    begin, status, result = time.monotonic(), "failed", None
    words = [sys.executable, *shlex.split(command)]
    with open(output / f"{name}.out", "wb") as out, open(output / f"{name}.err", "wb") as err:
        process = subprocess.Popen(words, cwd=common.ROOT, stdout=out, stderr=err, process_group=0)
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            status = "overran"
        finally:  # also after Ctrl-C
            stop(process)
    if process.returncode == 0:
        with contextlib.suppress(ValueError, IndexError):  # the output has no JSON line
            result = common.last_json((output / f"{name}.out").read_text())
            status = "done"
    found = {"status": status, "seconds": round(time.monotonic() - begin, 1), "result": result}
    return {"name": name, "command": command, **found}


def told(entry: dict[str, Any], output: Path) -> str:
    """Returns a line about a command: its milliseconds, or the last line that it printed."""
    rows = (entry["result"] or {}).get("rows", ())
    said = [f"{row['ms']:.4g} ms" for row in rows if row.get("ms")]
    said = said or (output / f"{entry['name']}.err").read_text(errors="replace").splitlines()[-1:]
    return f"{entry['name']}: {entry['status']}, {entry['seconds']} s: {', '.join(said)}"


def done_before(path: Path) -> set[tuple[str, str]]:
    """Returns names and commands of finished benchmarks; ignores truncated lines."""
    found: list[dict[str, Any]] = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    entries = [
        entry for entry in found if isinstance(entry, dict) and entry.get("status") == "done"
    ]
    return {(entry["name"], entry["command"]) for entry in entries}


def keep(path: Path, entry: dict[str, Any]) -> None:
    """Appends a line to results.jsonl, even if the last line there is truncated."""
    whole = not path.exists() or path.read_text()[-1:] in ("", "\n")
    with path.open("a") as file:
        file.write(("" if whole else "\n") + json.dumps(entry) + "\n")


def main() -> int:
    """Runs what is not done; returns 1 if a benchmark failed or exceeded its limit."""
    parser = common.parser(__doc__)
    parser.add_argument("--set", choices=SETS, default="one-gpu")
    parser.add_argument("--output", default=Path("runs/suite"), type=Path)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the set's commands")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="of all commands together"
    )
    args = parser.parse_args()
    if not args.minutes > 0:
        raise ValueError(f"--minutes {args.minutes:g}: must be above 0")
    lines = [line.split(None, 2) for line in SETS[args.set].strip().split("\n")]
    listed = {name: (float(limit), f"benchmarks/{words}") for name, limit, words in lines}
    if unknown := set(args.only or ()) - set(listed):
        raise ValueError(f"--only {min(unknown)}: --set {args.set} has {', '.join(listed)}")
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    share_cache(output)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops the running command first

    results, end, rows = output / "results.jsonl", time.monotonic() + 60 * args.minutes, []
    before = done_before(results)
    for name in args.only or listed:
        limit, command = listed[name]
        left, entry = end - time.monotonic(), {"name": name, "status": "done before"}
        if (name, command) not in before and limit > left:
            entry["status"] = "left"
            print(
                f"{name}: left, its limit is {limit:g} s and {max(left, 0):.0f} remain", flush=True
            )
        elif (name, command) not in before:
            entry = execute(name, limit, command, output)
            keep(results, entry)
            print(told(entry, output), flush=True)
        rows.append({key: entry.get(key) for key in ("name", "status", "seconds")})
    common.report(rows, benchmark="suite", set=args.set, output=str(output))
    return int(any(row["status"] in ("failed", "overran") for row in rows))


if __name__ == "__main__":
    common.run(main)
