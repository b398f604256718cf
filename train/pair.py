"""A shipped set, end to end: target, the target's own answers, every draft, evaluation.

    python train/pair.py --data data/open.jsonl.gz --validation data/open_val.jsonl \\
        --eval data --output runs/tiny --set attention=cudnn

`--target DIR` keeps a target that there is. All drafts see the same text for the same number of
steps. Everything resumes: start it again after an interruption. Ends in evaluation's JSON line.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

from eagle_jax.text import Tokenizer, read_prompts

# The draft shall imitate every way of decoding: temperature and seed of the answers it learns from.
ANSWERS = (("0.0", "0"), ("1.0", "1000000"), ("1.0", "2000000"))
DRAFTS = ("eagle", "eagle3", "medusa", "model")


def sample_prompts(source: str, target: Path, tokenizer: Tokenizer, longest: int) -> None:
    """Distinct first user turns of at most `longest` tokens, shuffled with a fixed seed."""
    firsts = {json.dumps([turns[0]]): turns[:1] for turns in read_prompts(source)}
    kept = [turns for turns in firsts.values() if len(tokenizer.chat(turns)) <= longest]
    random.Random(0).shuffle(kept)
    target.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in kept))


def run(module: str, *arguments: str) -> None:
    """One of the project's own commands, echoed."""
    command = [sys.executable, *module.split(), *arguments]
    print("$", " ".join(command[1:]), flush=True)
    subprocess.run(command, check=True)


def main() -> None:
    """Run the steps in order."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="conversations, JSONL or JSONL.gz")
    parser.add_argument("--validation", required=True, help="held-out conversations")
    parser.add_argument("--eval", help="directory of question files; default: our own prompts")
    parser.add_argument("--output", default="runs/tiny", type=Path)
    parser.add_argument("--configs", default="configs/tiny", type=Path)
    parser.add_argument("--eval-config", default="configs/eval/tiny.py")
    parser.add_argument("--target", type=Path, help="a trained target, instead of training one")
    parser.add_argument("--drafts", nargs="+", default=DRAFTS, help="by name of their config")
    parser.add_argument("--prompts", default=40000, type=int, help="prompts the target answers")
    parser.add_argument("--batch-size", default=1024, type=int, help="rows decoded together")
    parser.add_argument("--new-tokens", default=380, type=int, help="longest answer")
    parser.add_argument("--set", action="append", default=[], help="override, for all trainings")
    args = parser.parse_args()
    out, model = args.output, args.output / "model"
    out.mkdir(parents=True, exist_ok=True)
    shared = [f"data.validation=({args.validation!r},)", *args.set]

    def train(config: str, *sets: str) -> None:
        overrides = [word for item in (*sets, *shared) for word in ("--set", item)]
        run("-m eagle_jax.train", "--config", str(args.configs / config), *overrides)

    if args.target is None:
        train("target.py", f"data.train=({args.data!r},)", f"output_dir={out}/target")
    shutil.copytree(args.target or out / "target/export", model / "target", dirs_exist_ok=True)

    prompts = out / "prompts.jsonl"
    if not prompts.exists():
        sample_prompts(args.data, prompts, Tokenizer.load(model / "target"), longest=128)
    texts = [args.data]
    for number, (temperature, seed) in enumerate(ANSWERS):
        texts.append(f"{out}/answers-{number}.jsonl")
        options = ["--method", "vanilla", "--temperature", temperature, "--seed", seed]
        options += ["--limit", str(args.prompts), "--batch-size", str(args.batch_size)]
        options += ["--max-new-tokens", str(args.new_tokens), "--model", str(model / "target")]
        run("-m eagle_jax.decode", "--input", str(prompts), "--output", texts[-1], *options)

    for name in args.drafts:
        sources = f"data.train=({','.join(map(repr, texts))})"
        train(f"{name}.py", sources, f"objective.target={model}/target", f"output_dir={out}/{name}")
        shutil.copytree(out / name / "export", model / name, dirs_exist_ok=True)
    data = ["--data", args.eval] if args.eval else []
    options = ["--config", args.eval_config, "--set", f"model={model}", *data]
    run("-m eagle_jax.evaluate", *options, "--output", str(out / "evaluation"))


if __name__ == "__main__":
    main()
