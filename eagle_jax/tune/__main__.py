"""Command line of tuning: `eagle-jax tune --model tiny`."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from eagle_jax import cli, compilation_cache
from eagle_jax.commands import options

_EPILOG = """\
what it does
  1. times the target's pass over 1 to 64 tokens, and a step of every draft, on this device;
  2. decodes some prompts with wide trees and counts which drafted tokens are accepted;
  3. predicts tokens per second of some hundred settings of every method;
  4. lets the best of each family compete with vanilla decoding, in turn on the same prompts: all
     on a few prompts, the two fastest on all. The fastest is chosen if the 95 % bootstrap
     interval of its speedup lies above 1, otherwise vanilla.

what it leaves
  tuning.json in the model's directory, or in the user's cache where that cannot be written: an
  entry per device, dtype, batch size, greedy or sampled decoding, and weights. From then on
  generate(..., method="auto") and eagle-jax generate --method auto use it. After a change of
  weights or drafts, tune again. A draft given with --draft has to be loaded wherever you decode,
  too. The last line of standard output is one JSON object.

Other work on the machine disturbs: it makes intervals wide, and then vanilla is chosen. The
shipped model takes 6.5 minutes of processor time on CPUs, most of it compilation.

examples
  {prog}
  {prog} --model MODEL --draft HEAD --temperature 0 --batch-size 1 2 4 8
  {prog} --model MODEL --data data --task mt_bench --new-tokens 256
"""


def parser(prog: str = "python -m eagle_jax.tune") -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    out = cli.Parser(
        prog=prog,
        description="Find the fastest decoding method for a model on this machine, and store it.",
        epilog=_EPILOG.format(prog=prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_model(out)
    out.add_argument("--data", default="", metavar="DIR", help="directory of question files")
    out.add_argument(
        "--task", default="own", metavar="NAME", help="DIR/NAME.jsonl (default: prompts of our own)"
    )
    out.add_argument("--limit", type=int, default=24, metavar="N", help="prompts (24; 0: all)")
    out.add_argument(
        "--temperature",
        nargs="+",
        type=float,
        default=[0.0, 1.0],
        metavar="T",
        help="0 is greedy; what is found at another serves all others (default: 0 1)",
    )
    out.add_argument(
        "--batch-size",
        nargs="+",
        type=int,
        default=[1],
        metavar="N",
        help="prompts decoded together; an entry each, for a power of two and less (1)",
    )
    out.add_argument("--new-tokens", type=int, default=96, metavar="N", help="longest answer (96)")
    return out


def main(argv: list[str] | None = None, prog: str = "python -m eagle_jax.tune") -> None:
    """Runs the command line."""
    args = parser(prog).parse_args(argv)
    if args.limit < 0:
        raise ValueError(f"limit={args.limit}: must be at least 0")
    compilation_cache.enable()
    from eagle_jax.decode import tuning_store
    from eagle_jax.decode.prompts import encode
    from eagle_jax.evaluate.tasks import read_tasks
    from eagle_jax.tune import tune

    (questions,) = read_tasks([args.task], args.data, args.limit).values()
    params = options.load_model(args)
    for path in tuning_store.places(params):
        tuning_store.entries(path)  # raises for a damaged file before the work starts
    prompts = [encode(params, question.turns[0], raw=False) for question in questions]
    print(f"{args.model} on {tuning_store.device(params)}, {len(prompts)} prompts", file=sys.stderr)
    found, stored = [], ""
    runs = [
        tune(
            params,
            [prompt.tolist() for prompt in prompts],
            temperatures=args.temperature,
            batch_size=rows,
            new_tokens=args.new_tokens,
        )
        for rows in dict.fromkeys(args.batch_size)
    ]
    for tunings in runs:
        for i, tuning in enumerate(tunings):
            stored = str(tuning_store.store(params, [tuning.entry]))  # now, in case the run stops
            print("\n".join([*_passes(tuning), *_table(tuning)] if i == 0 else _table(tuning)))
            print(f"stored in {stored}", flush=True)
            found.append(tuning)
    print(json.dumps(_summary(found, stored)), flush=True)


def _passes(tuning: Any) -> list[str]:
    times = ", ".join(f"{size}: {1e3 * s:.2f}" for size, s in tuning.passes.items())
    return [f"target's pass, ms by tokens: {times}"]


def _table(tuning: Any) -> list[str]:
    from eagle_jax.tune import row

    rows = [("final", row(m)) for m in tuning.final]
    final = {r["method"] for _, r in rows}
    rows += [("heats", r) for r in map(row, tuning.heats) if r["method"] not in final]
    out = [
        f"\nbatch size {tuning.entry['key']['rows']}, temperature {tuning.temperature:g}: "
        f"vanilla {tuning.vanilla:.1f} tokens/s",
        f"{'method':44}{'predicted: tau':>15}{'tokens/s':>10}{'measured: tau':>15}{'tokens/s':>10}"
        "  speedup",
    ]
    for where, r in rows:
        interval = "" if r["interval"] is None else " ({:.2f}-{:.2f})".format(*r["interval"])
        out.append(
            f"{r['name'][:43]:44}{r['predicted_tau']:15.2f}{r['predicted_tokens_per_second']:10.1f}"
            f"{r['tau']:15.2f}{r['tokens_per_second']:10.1f}  {r['speedup']:.2f}x{interval}"
            + ("" if where == "final" else ", a few prompts")
        )
    return [*out, f"chosen: {tuning.entry['method']}"]


def _summary(found: Any, stored: str) -> dict[str, Any]:
    kept = ("temperature", "method", "speedup", "interval")
    return {
        "chosen": [
            {"batch_size": t.entry["key"]["rows"]} | {name: t.entry[name] for name in kept}
            for t in found
        ],
        "device": found[0].entry["key"]["device"],
        "dtype": found[0].entry["key"]["dtype"],
        "stored": stored,
    }


if __name__ == "__main__":
    cli.run(main)
