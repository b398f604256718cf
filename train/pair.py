"""The shipped pair, end to end: target, the target's own answers, draft, measurement.

    python train/pair.py --data data/open.jsonl.gz --validation data/open_val.jsonl \\
        --eval data/mt_bench.jsonl --output runs/tiny --set attention=cudnn

Everything resumes: start it again after an interruption. Ends in the measurement's JSON line.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

from eagle_jax.text import Tokenizer, read_prompts


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
    parser.add_argument("--eval", required=True, help="question file with `turns` (MT-bench)")
    parser.add_argument("--output", default="runs/tiny", type=Path)
    parser.add_argument("--configs", default="configs/tiny", type=Path)
    parser.add_argument("--prompts", default=20000, type=int, help="prompts the target answers")
    parser.add_argument("--batch-size", default=1024, type=int, help="rows decoded together")
    parser.add_argument("--new-tokens", default=380, type=int, help="longest answer")
    parser.add_argument("--set", action="append", default=[], help="override, for both trainings")
    args = parser.parse_args()
    out, pair = args.output, args.output / "pair"
    out.mkdir(parents=True, exist_ok=True)
    shared = [f"data.validation=({args.validation!r},)", *args.set]

    def train(config: str, *sets: str) -> None:
        overrides = [word for item in (*sets, *shared) for word in ("--set", item)]
        run("-m eagle_jax.train", "--config", str(args.configs / config), *overrides)

    train("target.py", f"data.train=({args.data!r},)", f"output_dir={out}/target")
    shutil.copytree(out / "target/export", pair / "target", dirs_exist_ok=True)

    prompts = out / "prompts.jsonl"
    if not prompts.exists():
        sample_prompts(args.data, prompts, Tokenizer.load(pair / "target"), longest=128)
    answers = []
    for temperature in ("0.0", "1.0"):  # the draft shall imitate both ways of decoding
        answers.append(f"{out}/answers-{temperature}.jsonl")
        options = ["--method", "vanilla", "--temperature", temperature]
        options += ["--limit", str(args.prompts), "--batch-size", str(args.batch_size)]
        options += ["--max-new-tokens", str(args.new_tokens), "--model", str(pair / "target")]
        run("-m eagle_jax.decode", "--input", str(prompts), "--output", answers[-1], *options)

    texts = ",".join(repr(path) for path in (*answers, args.data))
    train("eagle.py", f"data.train=({texts})", f"objective.target={pair}/target",
          f"output_dir={out}/eagle")  # fmt: skip
    shutil.copytree(out / "eagle/export", pair / "draft", dirs_exist_ok=True)
    run("benchmarks/speed.py", "--model", str(pair), "--questions", args.eval)


if __name__ == "__main__":
    main()
