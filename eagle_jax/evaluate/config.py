"""The configuration of an evaluation; imports no JAX."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from eagle_jax.settings import check

BASELINE = "vanilla"


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """The configuration of one evaluation.

    Attributes:
        output_dir: receives samples, results and plots; a stopped run resumes from it.
        methods: (name, method) pairs, compared in this order; vanilla is added if missing. "auto"
            as a method selects what `python -m eagle_jax.tune` found for `batch_size` rows.
        model: "tiny" or a directory that `eagle_jax.load` reads.
        drafts: further directories of drafts.
        dtype: dtype of weights and arithmetic; by default the device's (`eagle_jax.load`).
        quantize: "int8" stores the target's matrices in eight bits (`eagle_jax.load`); the baseline
            is vanilla decoding of that same target.
        quantize_drafts: "int8" does the same for the drafts; this does not change any text.
        tasks: "own" (prompts of this package), or NAME for data/NAME.jsonl. The default is "own"
            without `data`, else those of mt_bench, humaneval, gsm8k, alpaca that `data` has.
        data: directory of question files.
        limit: questions of each task, evenly spaced over its file; 0 takes all.
        temperatures: sampling temperatures, measured separately; 0 is greedy.
        top_p: nucleus sampling threshold; 1 disables it.
        new_tokens: tokens of the longest answer.
        ignore_eos: decode all answers to `new_tokens`.
        exact: as in `generate`: equal texts in bfloat16 too, with slower passes; the times then do
            not represent normal decoding.
        seed: seed of the sampling noise; each question's own seed is derived from it.
        repeats: timed runs of every method on every prompt.
        warm_up: run every shape once before timing. False takes half as long and suffices for
            acceptance and equality; times then include the cost of a first run.
        tensor, expert: use all devices: groups of `tensor` x `expert` devices share the weights,
            and the groups split the rows of a batch. 0 uses one device.
        batch_size: prompts decoded together, the longest first; the last batch is padded to this
            size.
        longest_prompt: in tokens; longer prompts are skipped, as are those that leave less than
            `new_tokens` of the context. 0 sets no further limit. Prompts are padded to powers of
            two from 128 on, and each size compiles its own programs, so this limits compile time.
        compile_threads: programs compiled at the same time.
        step_times: numbers of nodes for which a target pass is timed; () skips this measurement.
        step_prompts: number of prompts for that measurement.
    """

    output_dir: str
    methods: tuple[tuple[str, Any], ...]
    model: str = "tiny"
    drafts: tuple[str, ...] = ()
    dtype: Literal["float32", "bfloat16"] | None = None
    quantize: Literal["int8"] | None = None
    quantize_drafts: Literal["int8"] | None = None
    tasks: tuple[str, ...] = ()
    data: str = ""
    limit: int = 0
    temperatures: tuple[float, ...] = (0.0, 1.0)
    top_p: float = 1.0
    new_tokens: int = 128
    ignore_eos: bool = False
    exact: bool = False
    seed: int = 0
    repeats: int = 3
    warm_up: bool = True
    tensor: int = 0
    expert: int = 1
    batch_size: int = 1
    longest_prompt: int = 0
    compile_threads: int = 4
    step_times: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    step_prompts: int = 3

    def __post_init__(self) -> None:
        check(self)
        at_least = {
            **dict.fromkeys(("limit", "longest_prompt", "seed", "tensor"), 0),
            **dict.fromkeys(("new_tokens", "repeats", "batch_size", "compile_threads"), 1),
            **dict.fromkeys(("step_prompts", "expert"), 1),
        }
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {least}")
        if not self.output_dir:
            raise ValueError("output_dir='': empty; give a directory")
        if self.seed >= 2**32:
            raise ValueError(f"seed={self.seed}: must be at least 0 and below 2**32")
        if not self.temperatures or not all(0 <= t < math.inf for t in self.temperatures):
            raise ValueError(f"temperatures={self.temperatures}: give numbers of 0 or more")
        if self.step_times and min(self.step_times) < 1:
            raise ValueError(f"step_times={self.step_times}: give numbers of nodes, 1 or more")
        for field in ("tasks", "temperatures", "step_times"):
            _distinct(field, getattr(self, field))
        _distinct("methods", [name for name, _ in self.methods])
        for name, _ in self.methods:
            if not name or "," in name or name != name.strip():
                raise ValueError(f"methods: the name {name!r}; use a word without commas")

    def chosen(self, names: list[str]) -> tuple[tuple[str, Any], ...]:
        """Returns the named methods and the baseline, in the order of the configuration.

        Raises:
            ValueError: a name is unknown; the message lists the valid ones.
        """
        valid = [name for name, _ in self.methods]
        for name in names:
            if name not in (*valid, BASELINE):
                raise ValueError(f"methods={name!r}: unknown; use {', '.join(valid)}")
        return tuple(pair for pair in self.methods if pair[0] in (*names, BASELINE))


def _distinct(field: str, values: Any) -> None:
    for i, value in enumerate(values):
        if value in values[:i]:
            raise ValueError(f"{field}: {value!r} stands twice; give it once")
