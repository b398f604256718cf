"""Trains a target and its drafts end to end: target, its own answers, every draft, evaluation.

    python train/pair.py --data data/open.jsonl.gz --validation data/open_val.jsonl \\
        --eval data --output runs/tiny --set attention=cudnn

`--target DIR` uses an existing target; `--prompts 0` skips its answers. All drafts are trained on
the same text; `--together` trains them concurrently, so that loading and compiling overlap. The
same command resumes after an interruption. The last line of output is evaluation's JSON line.
"""

import argparse
import shutil
from pathlib import Path

from eagle_jax import cli
from eagle_jax.jobs import run

HERE = Path(__file__).resolve().parent
DRAFTS = ("eagle", "eagle3", "medusa", "model")


def main() -> None:
    """Runs the steps in order."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="conversations, JSONL or JSONL.gz")
    parser.add_argument("--validation", required=True, help="held-out conversations")
    parser.add_argument("--eval", help="directory of question files; default: our own prompts")
    parser.add_argument("--output", default="runs/tiny", type=Path)
    parser.add_argument("--configs", default=HERE.parent / "configs/tiny", type=Path)
    parser.add_argument("--eval-config", default=str(HERE.parent / "configs/eval/tiny.py"))
    parser.add_argument("--target", type=Path, help="a trained target, instead of training one")
    parser.add_argument("--drafts", nargs="+", default=DRAFTS, help="by name of their config")
    parser.add_argument("--prompts", default=40000, type=int, help="prompts the target answers")
    parser.add_argument("--batch-size", default=1024, type=int, help="answers at once")
    parser.add_argument("--new-tokens", default=380, type=int, help="longest answer")
    parser.add_argument("--together", action="store_true", help="train the drafts at once")
    parser.add_argument("--set", action="append", default=[], help="override, for all trainings")
    args = parser.parse_args()
    out, model = args.output, args.output / "model"
    out.mkdir(parents=True, exist_ok=True)

    def training(name: str, *sets: str) -> tuple[Path, list[str]]:
        command = ["-m", "eagle_jax.train", "--config", str(args.configs / f"{name}.py")]
        shared = [f"output_dir={out}/{name}", f"data.validation=({args.validation!r},)", *args.set]
        return out / f"{name}.log", command + [f"--set={item}" for item in (*sets, *shared)]

    if args.target is None:
        run(training("target", f"data.train=({args.data!r},)"))
    shutil.copytree(args.target or out / "target/export", model / "target", dirs_exist_ok=True)
    if args.prompts:
        command = [str(HERE / "answers.py"), "--model", str(model / "target"), "--data", args.data]
        for name in ("output", "prompts", "batch_size", "new_tokens"):
            command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
        run((out / "answers.log", command))
    texts = [args.data, *map(str, sorted(out.glob("answers-?.jsonl")) if args.prompts else ())]
    sets = f"data.train=({','.join(map(repr, texts))},)", f"objective.target={model}/target"
    run(*(training(name, *sets) for name in args.drafts), together=args.together)
    for name in args.drafts:
        shutil.copytree(out / name / "export", model / name, dirs_exist_ok=True)
    command = ["-m", "eagle_jax.evaluate", "--config", args.eval_config]
    command += ["--set", f"model={model}", "--output", str(out / "evaluation")]
    run((out / "evaluation.log", command + (["--data", args.eval] if args.eval else [])))


if __name__ == "__main__":
    cli.run(main)
