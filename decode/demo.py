"""Generates the same answer with vanilla decoding and with EAGLE and times both: `make demo`.

python decode/demo.py ["your prompt"] [--temperature 1.0 --seed 7]

After `eagle-jax tune`, the method that it found is used instead of EAGLE.
"""

import argparse
import statistics
import sys

import jax

import eagle_jax
from eagle_jax import cli, compilation_cache
from eagle_jax.decode import generate, stream, tuning_store

PROMPT = (
    "Anna reads 20 pages a day for 5 days, then 30 a day for 3 days. How many pages is that in all?"
)
REPEATS = 9
SLOWER = """
Drafting does not pay here: the target's pass over a tree costs more, in passes over one token, than
it commits tokens. That is common on CPUs and with a target as small as this one. On GPUs and TPUs,
with larger targets, a pass over some tokens takes hardly longer than a pass over one.
`eagle-jax tune` finds what is fastest on this machine, vanilla decoding included; method="auto"
then uses it."""


def show(params, prompt, method, **options):
    """Streams one answer to the terminal; the first call also compiles."""
    print(f"\n--- {method} ---", flush=True)
    for part in stream(params, prompt, method=method, **options):
        print(part.text, end="", flush=True)
    print(flush=True)


def main():
    """Streams both answers, then times both methods in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt", nargs="?", default=PROMPT)
    parser.add_argument("--model", default="tiny", help="shipped pair or directory")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-new-tokens", type=int, default=160)
    args = parser.parse_args()
    options = {
        "temperature": args.temperature,
        "seed": args.seed,
        "max_new_tokens": args.max_new_tokens,
    }
    compilation_cache.enable()  # the second start does not compile
    params = eagle_jax.load(args.model)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}\nprompt: {args.prompt}")
    fast = "auto" if tuning_store.find(params, 1, args.temperature) else "eagle"
    methods = ("vanilla", fast)
    for method in methods:
        show(params, args.prompt, method, **options)

    runs = {method: [] for method in methods}
    for _ in range(REPEATS):
        for method in methods:
            runs[method].append(generate(params, args.prompt, method=method, **options))
    vanilla, seconds = (
        statistics.median(run.statistics.decode_seconds for run in runs[method])
        for method in methods
    )
    last = runs[fast][-1]
    same = list(last.tokens) == list(runs["vanilla"][-1].tokens)
    tokens, tau = len(last.tokens), last.statistics.tau
    print(f"\nsame text: {'yes' if same else 'NO'} ({tokens} tokens)")
    print(f"vanilla:   {tokens / vanilla:7.1f} tokens/s")
    print(f"{fast + ':':10} {tokens / seconds:7.1f} tokens/s ({last.statistics.method})")
    print(f"speedup:   {vanilla / seconds:7.2f}x (medians of {REPEATS} interleaved runs)")
    print(f"mean acceptance length: {tau:.2f} tokens a pass, bonus token included")
    if seconds > vanilla:
        print(SLOWER)
    if not same:
        # In bfloat16 near-ties may be resolved differently; in float32 this would be a defect.
        sys.exit("the texts differ")


if __name__ == "__main__":
    cli.run(main)
