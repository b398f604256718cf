"""Rebuilds `train/sample/`: conversations that a model generates from the prompts there.

    python train/sample.py

Every prompt is answered twice, greedily and at temperature 0.7. Every 13th prompt is held out for
validation. This takes about six minutes on two CPU cores.
"""

import argparse
import gzip
import json
import random
import tempfile
from pathlib import Path

import eagle_jax
from eagle_jax import cli
from eagle_jax.decode.batching.answer_file import answer_file

HERE = Path(__file__).parent / "sample"
HELD_OUT, OFFSET = 13, 5
PASSES = ({"temperature": 0.7, "top_p": 0.95}, {"temperature": 0.0})


def main():
    """Answers the prompts, splits the conversations and writes them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="shipped pair or directory")
    parser.add_argument("--prompts", default=HERE / "prompts.jsonl", type=Path)
    parser.add_argument("--output", default=HERE, type=Path, help="folder to write into")
    parser.add_argument("--limit", type=int, help="only the first N prompts")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    args = parser.parse_args()
    params = eagle_jax.load(args.model)
    train, held_out = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number, sampling in enumerate(PASSES):
            answers = Path(folder) / f"{number}.jsonl"
            options = {"limit": args.limit, "batch_size": args.batch_size, "seed": 100, **sampling}
            options |= {"max_new_tokens": args.max_new_tokens, "method": "vanilla"}
            answer_file(params, args.prompts, answers, **options)
            records = sorted(
                map(json.loads, answers.read_bytes().splitlines()),
                key=lambda record: record["index"],
            )
            for record in records:
                line = json.dumps({"messages": record["messages"]}, ensure_ascii=False) + "\n"
                if record["index"] % HELD_OUT != OFFSET:
                    train.append(line)
                elif number == 0:
                    held_out.append(line)
    random.Random(0).shuffle(train)
    args.output.mkdir(parents=True, exist_ok=True)
    with gzip.GzipFile(args.output / "conversations.jsonl.gz", "wb", mtime=0) as out:
        out.write("".join(train).encode())
    (args.output / "validation.jsonl").write_text("".join(held_out))
    print(json.dumps({"train": len(train), "validation": len(held_out)}))


if __name__ == "__main__":
    cli.run(main)
