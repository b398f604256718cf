"""Measures the target's pass over T tokens: ms, GB/s, and share of a copy's bandwidth.

    python benchmarks/step.py --shape 7b
    python benchmarks/step.py --shape 8b --tokens 1 60 --cache 4096 16384 --used 512 3800
    python benchmarks/step.py --shape 70b --tokens 1 60 --cache 1024 --tensor 2

Weights are random, and the pass runs inside the engine's compiled loop, as in `generate`. T = 1 is
vanilla decoding; with more tokens the tree is the root and its T - 1 children. GB/s counts the
bytes that a pass must read: all weights once and the used part of the cache. The share is relative
to the bandwidth of a large copy on this device (bytes read and written), which is measured first;
100 % is as fast as memory allows. `--cache` is the allocated length, `--used` the filled length;
combinations that do not fit are left out.

With `--tensor` all bytes are those of one device: its parts of the weights and of the cache, and
everything that is replicated.
"""

import common
import loops
import shapes
from loops import Rounds, Slots

from eagle_jax.decode import Vanilla
from eagle_jax.decode.instrument import wide_pass
from eagle_jax.evaluate.metrics import weight_bytes


def main() -> None:
    """Measures every combination."""
    names = ("--shape", "--batch", "--rounds", "--repeats", "--quantize", "--layers", "--threads")
    names += ("--tensor",)
    parser = common.parser(__doc__, *names)
    number = {"type": common.positive, "nargs": "+"}
    parser.add_argument("--tokens", default=[1, 2, 4, 8, 16, 32, 64, 128], **number)
    parser.add_argument("--cache", default=[1024, 4096, 16384], help="allocated slots", **number)
    parser.add_argument("--used", default=[512], help="slots with tokens in them", **number)
    args = parser.parse_args()

    mesh, copy = common.mesh(args.tensor), common.copy_bandwidth()
    params = shapes.random_params(args.shape, (), args.quantize, layers=args.layers, mesh=mesh)
    weights = weight_bytes(shapes.of_one_device(params.target))
    kv = Slots(params.target_config, 1, mesh=mesh).nbytes
    rows = []
    for slots in args.cache:
        place = Slots(params.target_config, slots, args.batch, mesh)
        jobs = {
            (t, used): Rounds(
                params, wide_pass(t) if t > 1 else Vanilla(), place, used, args.rounds
            )
            for t in args.tokens
            for used in args.used
            if used + args.rounds + 2 < slots or len(args.cache) == 1
        }
        if not jobs:
            continue
        programs = {t: job for (t, _), job in jobs.items()}.values()
        loops.compile_all(list(programs), place, args.threads)
        for (t, used), ms in common.interleave(jobs, args.repeats).items():
            read = weights + args.batch * used * kv
            rows.append(
                {
                    "tokens": t,
                    "cache": slots,
                    "used": used,
                    "ms": ms,
                    "GB/s": read / ms / 1e6,
                    "of copy": read / ms * 1e3 / copy,
                    "floor ms": 1e3 * read / copy,
                }
            )
    common.report(
        rows,
        benchmark="step",
        shape=args.shape,
        batch=args.batch,
        quantize=args.quantize,
        layers=args.layers,
        tensor=args.tensor,
        weight_bytes=weights,
        kv_bytes_per_token=kv,
        copy_GBps=copy / 1e9,
        **common.environment(),
    )


if __name__ == "__main__":
    common.run(main)
