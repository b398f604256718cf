"""Generates a target's own answers to the first turns of conversations, to train its drafts on.

    python train/answers.py --model runs/tiny/model/target --data data/open.jsonl.gz \\
        --output runs/tiny

The output folder gets `prompts.jsonl` and one file per decoding pass (temperature and seed):
`answers-0.jsonl`, `answers-1.jsonl`, ... The same command resumes after an interruption. Answers of
another model or to other prompts are not mixed in (`answers.json` records model and prompts).
"""

import argparse
import hashlib
import json
import random
from pathlib import Path

import eagle_jax
from eagle_jax import cli, fingerprint
from eagle_jax.checkpoint import files
from eagle_jax.decode.batching.answer_file import answer_file
from eagle_jax.text import read_prompts

# The temperature and the first prompt's seed of each pass.
PASSES = ((0.0, 0), (1.0, 1000000), (1.0, 2000000))
LONGEST = 128  # the longest prompt, in tokens


def main() -> None:
    """Collects prompts and answers them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="shipped pair or directory")
    parser.add_argument("--data", required=True, help="conversations, JSONL or JSONL.gz")
    parser.add_argument("--output", required=True, type=Path, help="folder to write into")
    parser.add_argument("--prompts", default=40000, type=int, help="how many are answered")
    parser.add_argument("--batch-size", default=1024, type=int, help="rows decoded together")
    parser.add_argument("--new-tokens", default=380, type=int, help="longest answer")
    args = parser.parse_args()
    params = eagle_jax.load(args.model)
    assert params.tokenizer is not None  # model directories have a tokenizer

    args.output.mkdir(parents=True, exist_ok=True)
    prompts, made = args.output / "prompts.jsonl", args.output / "answers.json"
    firsts = {json.dumps([turns[0]]): turns[:1] for turns in read_prompts(args.data)}
    kept = [turns for turns in firsts.values() if len(params.tokenizer.chat(turns)) <= LONGEST]
    random.Random(0).shuffle(kept)
    text = "".join(json.dumps({"messages": turns}) + "\n" for turns in kept)
    digest = hashlib.sha256(text.encode()).hexdigest()
    own = {"weights": fingerprint.of_params(params.with_draft(None)), "prompts": digest}
    if made.exists() and files.read_json(made) != own:
        raise ValueError(
            f"{made}: the answers there are another model's, or to other prompts; give another "
            "--output"
        )
    prompts.write_text(text)
    files.write_json(made, own)
    options = {"limit": args.prompts, "batch_size": args.batch_size, "method": "vanilla"}
    options["max_new_tokens"] = args.new_tokens
    for number, (temperature, seed) in enumerate(PASSES):
        answers = args.output / f"answers-{number}.jsonl"
        found = answer_file(params, prompts, answers, temperature=temperature, seed=seed, **options)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    cli.run(main)
