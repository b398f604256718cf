"""Measures training speed: tokens/s and MFU of the trainer's own jitted step.

    python benchmarks/train.py --shape 7b --batch 4 --attention cudnn
    python benchmarks/train.py --config configs/large/target.py configs/large/eagle.py \\
        --target-config configs/large/target.py

A frozen target of that shape with random weights runs in every step (online training) on random
tokens; no text is read. `--config` measures the configurations of real runs instead, with their
batch size, length and attention kernel; their target is the model of `--target-config`. Tokens are
positions of the batch. MFU is model FLOPs as training counts them (without recomputation) over the
device's peak.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import common
import jax
import numpy as np
import shapes

from eagle_jax import hardware, settings, sharding
from eagle_jax.config import (
    DataConfig,
    Eagle3Config,
    EagleConfig,
    FeatureRegression,
    MedusaConfig,
    MedusaTraining,
    NextToken,
    OptimConfig,
    TrainConfig,
    TrainingTimeTest,
    TransformerConfig,
)
from eagle_jax.models import Transformer
from eagle_jax.train import objectives
from eagle_jax.train.trainer import assemble, check_attention

_BATCHES = 4  # number of different batches, used in turn


def synthetic(kind: str, args: Any) -> TrainConfig:
    """Returns a run with a published recipe's objective and the sizes of the command line."""
    draft: Any = shapes.draft_configs(args.shape)[kind]
    if isinstance(draft, EagleConfig):
        objective = FeatureRegression(draft, target="-")
    elif isinstance(draft, Eagle3Config):
        objective = TrainingTimeTest(draft, target="-")
    else:
        assert isinstance(draft, MedusaConfig)
        objective = MedusaTraining(draft, target="-")
    return TrainConfig(
        output_dir="-",
        objective=objective,
        data=DataConfig((), sequence_length=args.sequence, batch_size=args.batch),
        optim=OptimConfig(learning_rate=3e-5, steps=1000, clip_norm=0.5),
        compute_dtype="float32" if jax.default_backend() == "cpu" else "bfloat16",
        attention=args.attention,
        remat=args.remat,
    )


class Steps:
    """A job that repeats some steps of a run on random tokens, on one device."""

    def __init__(
        self, config: TrainConfig, target: TransformerConfig, frozen: Mapping[str, Any], steps: int
    ) -> None:
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
        check_attention(config, mesh)
        if isinstance(config.objective, NextToken):
            objective, frozen = objectives.build(config), {}
        else:
            frozen = jax.device_put(frozen, sharding.weight_shardings(mesh, frozen))
            objective = objectives.assemble(
                config,
                target,
                frozen,
                lambda draft, _: (shapes.offsets(draft.vocab_size, draft.draft_vocab_size), None),
            )
        self.trainer = assemble(config, objective, mesh, frozen)
        self.state, self.steps, self.done = self.trainer.init(), steps, 0
        shape = config.data.batch_size, config.data.sequence_length
        rng = np.random.default_rng(0)
        fixed = {
            "positions": np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1)),
            "segment_ids": np.ones(shape, np.int32),
            "loss_mask": np.ones(shape, np.float32),
        }
        self.batches = []
        for _ in range(_BATCHES):
            tokens = rng.integers(0, objective.vocab_size, shape, np.int32)
            self.batches.append(self.trainer.put({"tokens": tokens, **fixed}))

    def __call__(self) -> float:
        """Runs the steps and returns the milliseconds of one."""
        begin = time.perf_counter()
        for _ in range(self.steps):
            batch = self.batches[self.done % _BATCHES]
            self.state, _ = self.trainer.step(self.state, self.trainer.frozen, batch)
            self.done += 1
        jax.block_until_ready(self.state)
        return 1e3 * (time.perf_counter() - begin) / self.steps

    def row(self, name: str, ms: float) -> dict[str, Any]:
        """Returns the row of the report for this time of a step."""
        config, trained = self.trainer.config, self.trainer.abstract.params.values()
        length, batch = config.data.sequence_length, config.data.batch_size
        pace = 1e3 * length * batch / ms
        flops = pace * self.trainer.objective.flops_per_token(length)
        peak = config.peak_flops or hardware.peak_flops(jax.devices()[0].device_kind)
        return {
            "objective": name,
            "batch": batch,
            "sequence": length,
            "trained M": sum(x.size for x in trained) / 1e6,
            "ms": ms,
            "tokens/s": pace,
            "TFLOP/s": flops / 1e12,
            "MFU": None if peak is None else flops / peak,
        }


def main() -> None:
    """Measures the given objectives in turn."""
    parser = common.parser(__doc__, "--shape", "--batch", "--repeats")
    kinds = ("eagle", "eagle3", "medusa")
    parser.add_argument("--objectives", nargs="+", choices=kinds, default=["eagle", "eagle3"])
    parser.add_argument("--sequence", type=common.positive, default=2048)
    parser.add_argument("--steps", type=common.positive, default=5, help="of one timed call")
    parser.add_argument("--attention", choices=("xla", "cudnn"), default="xla")
    parser.add_argument("--remat", action="store_true", help="recompute activations")
    parser.add_argument("--config", nargs="+", help="of runs, in place of the synthetic ones")
    parser.add_argument("--target-config", help="of the target's training, for its architecture")
    parser.add_argument("--set", action="append", default=[], help="override, with --config")
    args = parser.parse_args()

    target = shapes.SHAPES[args.shape]
    runs = {kind: synthetic(kind, args) for kind in args.objectives}
    if args.config:
        runs = {
            Path(path).stem: settings.load(path, args.set, kind=TrainConfig) for path in args.config
        }
        model = settings.load(args.target_config or args.config[0], kind=TrainConfig).objective
        if not isinstance(model, NextToken):
            raise ValueError(f"--target-config {args.target_config}: give that of the target's run")
        target = model.model
    first, frozen = next(iter(runs.values())), {}
    if any(not isinstance(config.objective, NextToken) for config in runs.values()):
        frozen = shapes.random_weights(Transformer, target, dtype=first.compute_dtype)
    jobs = {name: Steps(config, target, frozen, args.steps) for name, config in runs.items()}
    ms = common.interleave(jobs, args.repeats)
    common.report(
        [jobs[name].row(name, value) for name, value in ms.items()],
        benchmark="train",
        shape=None if args.config else args.shape,
        config=args.config,
        attention=first.attention,
        remat=first.remat,
        peak_bytes=(jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
        **common.environment(),
    )


if __name__ == "__main__":
    common.run(main)
