"""Runs a model that is too large or too slow for one GPU on eight GPUs of a node, in one process.

    python decode/recipes/gpu_node.py "What is a prime number?" --model MODEL --draft HEAD

Each GPU holds an eighth of every matrix and of the KV cache. For a file of prompts use `eagle-jax
answers --tensor 8 --input prompts.jsonl --output answers.jsonl`.
"""

import argparse

import eagle_jax
from eagle_jax import cli
from eagle_jax.sharding import make_mesh


def main():
    """Answers the prompts as one batch."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt", nargs="+")
    parser.add_argument("--model", required=True, help="directory")
    parser.add_argument("--draft", action="append", help="directory of a head")
    parser.add_argument("--method", default="eagle", help="eagle2, eagle3, ... as the head is")
    parser.add_argument(
        "--tensor",
        type=int,
        default=8,
        help="GPUs that share the weights; divides the model's "
        "heads. With fewer than there are, groups of so many share the batch's rows",
    )
    parser.add_argument("--max-new-tokens", type=int, default=256)
    args = parser.parse_args()

    params = eagle_jax.load(args.model, draft=args.draft, sharding=make_mesh(tensor=args.tensor))
    out = eagle_jax.decode.generate(
        params, args.prompt, method=args.method, max_new_tokens=args.max_new_tokens
    )
    for prompt, answer in zip(args.prompt, out.text, strict=True):
        print(f"> {prompt}\n{answer}\n")
    print(
        f"{out.statistics.tau:.2f} tokens a pass, {out.statistics.tokens_per_second:.1f} tokens/s"
    )


if __name__ == "__main__":
    cli.run(main)
