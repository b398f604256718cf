"""Trains a larger pair for a fixed time on one 80 GB GPU, then measures every method with it.

    python benchmarks/large_pair.py --data data/open.jsonl.gz --validation data/open_val.jsonl \\
        --eval data --output runs/large --target-minutes 10 --draft-minutes 3

1. It measures the speed of every training (benchmarks/train.py, random weights). It writes
   plan.json with the number of steps that fit into the given minutes, so that every learning-rate
   schedule is finished, and the configurations.
2. train/pair.py trains the target, then EAGLE-1, EAGLE-3 and Medusa concurrently, and evaluates.
3. benchmarks/pair.py prints the table and the ratios of EAGLE to Lookahead and to Medusa.

The same command resumes after an interruption; SIGTERM and Ctrl-C save the current step first.
Options that are not listed go to train/pair.py (`--prompts 2000` also trains the drafts on 2000 of
the target's own answers). The disk holds one checkpoint of each training (13 GB for the target),
and two while one is written.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import common

from eagle_jax import settings
from eagle_jax.config import TrainConfig

_USED = 0.9  # share of the minutes for steps; the rest is compilation, validation, checkpoints
# Without the target's own answers, which take as long as a training: the shipped pair's EAGLE-1
# learned as much from the fixed text alone (its model card).
_PAIR = ["--together", "--prompts", "0", "--batch-size", "512"]
_EVAL = ["limit=10", "longest_prompt=256", "compile_threads=12"]
_CONFIG = """from eagle_jax import settings
from eagle_jax.config import TrainConfig
from eagle_jax.evaluate import EvalConfig

config = settings.load({path!r}, {overrides!r}, kind={kind})
"""


def call(*command: str) -> str:
    """Runs one of our programs, echoes its output, and returns the output.

    Signals are forwarded to all of its processes. The output ends when the last of them ends.
    """
    print("$", " ".join(command), flush=True)
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=common.ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None

    def forward(number: int, frame: Any) -> None:
        del frame
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    status = process.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    if status:
        print("stopped; the same command goes on from here", file=sys.stderr)
        raise SystemExit(status if status > 0 else 128 - status)
    return "".join(lines)


def planned(steps: int) -> list[str]:
    """Returns the overrides for a training of `steps`: four validations, three checkpoints."""
    often = {"eval_every": steps // 4, "checkpoint_every": steps // 3}
    return [f"optim.steps={steps}", *(f"{name}={max(1, n)}" for name, n in often.items())]


def plan(names: list[str], args: Any) -> dict[str, int]:
    """Returns the number of steps of each training; earlier entries of plan.json are kept."""
    path = args.output / "plan.json"
    steps: dict[str, int] = json.loads(path.read_text()) if path.exists() else {}
    if new := [name for name in names if name not in steps]:
        command = ["benchmarks/train.py", "--repeats", "2", "--config"]
        command += [str(args.configs / f"{name}.py") for name in new]
        command += ["--target-config", str(args.configs / "target.py")]
        command += [word for item in args.set for word in ("--set", item)]
        for row in common.last_json(call(*command))["rows"]:
            name = row["objective"]
            minutes = args.target_minutes if name == "target" else args.draft_minutes
            steps[name] = max(1, int(_USED * minutes * 60e3 / row["ms"]))
        path.write_text(json.dumps(steps) + "\n")
    return steps


def write_configs(folder: Path, steps: dict[str, int], args: Any) -> None:
    """Writes the configurations of the trainings, with their steps, and of the evaluation."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in steps.items():
        source = args.configs / f"{name}.py"
        settings.load(source, planned(count), kind=TrainConfig)  # raises now if it is wrong
        text = _CONFIG.format(path=str(source), overrides=planned(count), kind="TrainConfig")
        (folder / f"{name}.py").write_text(text)
    source = str(args.eval_config.resolve())
    overrides = args.eval_set or _EVAL
    (folder / "eval.py").write_text(
        _CONFIG.format(path=source, overrides=overrides, kind="EvalConfig")
    )


def main() -> None:
    """Plans, trains and measures."""
    parser = common.parser(__doc__)
    parser.add_argument("--data", required=True, help="conversations, JSONL or JSONL.gz")
    parser.add_argument("--validation", required=True, help="held-out conversations")
    parser.add_argument("--eval", help="directory of question files; default: our own prompts")
    parser.add_argument("--output", default=Path("runs/large"), type=Path)
    parser.add_argument("--configs", default=common.ROOT / "configs/large", type=Path)
    parser.add_argument("--eval-config", default=common.ROOT / "configs/eval/large.py", type=Path)
    parser.add_argument("--target-minutes", default=10.0, type=float)
    parser.add_argument("--draft-minutes", default=3.0, type=float, help="each")
    parser.add_argument("--drafts", nargs="+", default=["eagle", "eagle3", "medusa"])
    parser.add_argument("--set", action="append", default=[], help="override, for all trainings")
    help_eval = f"override, for the evaluation; by default {' '.join(_EVAL)}"
    parser.add_argument("--eval-set", action="append", default=[], help=help_eval)
    args, further = parser.parse_known_args()
    for name in ("data", "validation"):
        if not Path(getattr(args, name)).exists():
            raise ValueError(f"--{name} {getattr(args, name)}: there is no such file")
    args.output, args.configs = args.output.resolve(), args.configs.resolve()
    args.output.mkdir(parents=True, exist_ok=True)

    steps = plan(["target", *args.drafts], args)
    configs, model = args.output / "configs", args.output / "model"
    write_configs(configs, steps, args)
    left = [name for name in args.drafts if not (model / name).is_dir()] or args.drafts[-1:]
    command = ["train/pair.py", "--configs", str(configs), "--eval-config", f"{configs}/eval.py"]
    for name in ("data", "validation", "eval"):
        if value := getattr(args, name):
            command += [f"--{name}", str(Path(value).resolve())]
    command += ["--output", str(args.output), "--drafts", *left]
    if (args.output / "target" / "export").is_dir():
        command += ["--target", str(args.output / "target" / "export")]
    command += [word for item in args.set for word in ("--set", item)]
    call(*command, *_PAIR, *further)
    call("benchmarks/pair.py", "--results", str(args.output / "evaluation" / "results.json"))


if __name__ == "__main__":
    common.run(main)
