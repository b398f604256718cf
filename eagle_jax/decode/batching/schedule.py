"""Batch sizes of a batcher: what each decodes with, and which one is for how many requests.

A table from batch sizes to methods makes a stage of each size, e.g. of `{1: "eagle2", 4: "eagle",
8: "vanilla"}`: the fewer requests share a pass, the more nodes of a tree it has room for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eagle_jax.decode import tuning_store
from eagle_jax.decode.method import Method
from eagle_jax.decode.program import Program
from eagle_jax.decode.registry import AUTO
from eagle_jax.decode.sampling.checks import MOST_LOGPROBS
from eagle_jax.decode.session import check_method, make_program
from eagle_jax.params import Params

Table = Mapping[int, str | Method]

# What the prefill of a request that moves counts as, in passes. On two CPU cores the shipped
# model's took 1 to 9 (100 to 250 tokens), and 1 to 8 here did equally well, by a probe that is not
# in this repository.
MOVE = 8
_FOREVER = 2**31 - 1  # rounds


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """A batch size and what decodes there.

    Attributes:
        rows: b, requests decoded together.
        prefill_rows: p, prompts prefilled together; less than b, if b is more than 1.
        method: of this size.
        program: its loop.
        params: of the target and of the method's draft.
    """

    rows: int
    prefill_rows: int
    method: Method
    program: Program
    params: Params


def methods(
    params: Params, method: str | Method | Table, rows: int, temperature: float
) -> dict[int, Method]:
    """Checked methods by batch size, the sizes rising up to `rows`.

    Args:
        params: of the model.
        method: one for `rows` alone; a table, of which sizes above `rows` are left out and `rows`
            itself takes the method of the largest size below, if it has none; or "auto", the table
            of all tunings that are stored for sizes up to `rows`.
        rows: the largest batch.
        temperature: of the requests; a tuning is for 0 or for more.

    Raises:
        ValueError: no entry is small enough, a size is no whole number above 0, or what `generate`
            raises of a method.
    """
    if isinstance(method, str) and method == AUTO:
        method = tuning_store.table(params, rows, temperature)
    table = method if isinstance(method, Mapping) else {rows: method}
    for size in table:
        check_count("batch size", size)
    sizes = sorted(size for size in table if size <= rows)
    if not sizes:
        raise ValueError(
            f"method: a table for batch sizes {sorted(table)}, and rows={rows}; add one for 1"
        )
    chosen = {**{size: table[size] for size in sizes}, rows: table[sizes[-1]]}
    return {size: check_method(params, entry, size, temperature) for size, entry in chosen.items()}


def stages(
    params: Params,
    table: Mapping[int, Method],
    max_prompt: int,
    max_new_tokens: int,
    prefill_rows: int,
) -> tuple[Stage, ...]:
    """The stages of what `methods` returned, in its order."""
    return tuple(
        Stage(
            rows,
            min(prefill_rows, max(rows - 1, 1)),
            method,
            make_program(params, method, max_prompt, max_new_tokens),
            params.with_draft(method.draft),
        )
        for rows, method in table.items()
    )


def reporting(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """The same stages with programs that report log-probabilities."""
    return tuple(
        dataclasses.replace(
            stage, program=dataclasses.replace(stage.program, logprobs=MOST_LOGPROBS)
        )
        for stage in stages
    )


def wanted(
    stages: Sequence[Stage], now: Stage, left: Sequence[int], waiting: int, passes: int
) -> Stage:
    """The stage to go on with, by the rule that `Batcher` states.

    Args:
        stages: all of them, sizes rising.
        now: where the batch is.
        left: of each request in a row, the tokens up to its limit.
        waiting: requests without a row.
        passes: of the batch since it is there.
    """
    load = len(left) + waiting
    stage = next((stage for stage in stages if stage.rows >= load), stages[-1])
    cost = MOVE * len(left)
    pays = not left or min(passes, max(left)) >= cost
    return stage if load and (stage.rows > now.rows or pays) else now


def pause(
    stages: Sequence[Stage], now: Stage, live: int, waiting: int, passes: int
) -> tuple[int, int]:
    """When to look at the batch again: rounds from now, and rows that are done until then.

    Arguments are those of `wanted`, with the number of requests in rows, at least 1, for `left`.
    """
    smaller = max((stage.rows for stage in stages if stage.rows < now.rows), default=0)
    free = now.rows - live
    if waiting:
        return _FOREVER, min(free + min(waiting, now.prefill_rows), now.rows)
    if live > smaller:  # until the batch can shrink, a free row is of no use to anybody
        return _FOREVER, now.rows - smaller
    # It could already. It may in so many passes, and the sooner, the fewer would move.
    wait = MOVE * live - passes
    return wait if wait > 0 else _FOREVER, free + 1


def check_count(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is a whole number above 0."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r}: must be a whole number above 0")
