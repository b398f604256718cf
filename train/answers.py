"""A target's own answers to the first turns of conversations: text that its drafts learn from.

    python train/answers.py --model runs/tiny/model/target --data data/open.jsonl.gz \\
        --output runs/tiny

The output folder gets `prompts.jsonl` and, of every way of decoding that a draft shall imitate, a
file `answers-0.jsonl`, `answers-1.jsonl`, ... Start it again after an interruption: it goes on.
What another model answered, or other prompts, is not mixed in (`answers.json`).
"""

import argparse
import hashlib
import json
import random
from pathlib import Path

import eagle_jax
from eagle_jax import cli
from eagle_jax.checkpoint import files
from eagle_jax.decode.batching.answer_file import answer_file
from eagle_jax.decode.tuning_store import fingerprint
from eagle_jax.text import read_prompts

# Temperature, and the first prompt's seed.
PASSES = ((0.0, 0), (1.0, 1000000), (1.0, 2000000))
LONGEST = 128  # prompt, in tokens


def main() -> None:
    """Collect prompts, answer them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="shipped pair or directory")
    parser.add_argument("--data", required=True, help="conversations, JSONL or JSONL.gz")
    parser.add_argument("--output", required=True, type=Path, help="folder to write into")
    parser.add_argument("--prompts", default=40000, type=int, help="how many are answered")
    parser.add_argument("--batch-size", default=1024, type=int, help="rows decoded together")
    parser.add_argument("--new-tokens", default=380, type=int, help="longest answer")
    args = parser.parse_args()
    params = eagle_jax.load(args.model)
    assert params.tokenizer is not None  # every model directory has one

    args.output.mkdir(parents=True, exist_ok=True)
    prompts, made = args.output / "prompts.jsonl", args.output / "answers.json"
    firsts = {json.dumps([turns[0]]): turns[:1] for turns in read_prompts(args.data)}
    kept = [turns for turns in firsts.values() if len(params.tokenizer.chat(turns)) <= LONGEST]
    random.Random(0).shuffle(kept)
    text = "".join(json.dumps({"messages": turns}) + "\n" for turns in kept)
    digest = hashlib.sha256(text.encode()).hexdigest()
    own = {"weights": fingerprint(params.with_draft(None)), "prompts": digest}
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
