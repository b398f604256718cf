"""Batch sizes of a batcher: the method of each size, and the choice of a size for a given load.

Each entry of a table from batch sizes to methods, such as `{1: "eagle2", 4: "eagle",
8: "vanilla"}`, becomes a stage. The fewer requests share a pass, the larger the trees that pay off.
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

# Cost of prefilling a request anew when it moves to another batch size, in decoding passes.
MOVE = 8
_FOREVER = 2**31 - 1  # a number of rounds that no chunk reaches


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """A batch size with its method and its compiled loop.

    Attributes:
        rows: b, requests decoded together.
        prefill_rows: p, prompts prefilled together; less than b, if b is more than 1.
        method: the decoding method of this size.
        program: the static settings of its loop.
        params: the target and the method's draft.
    """

    rows: int
    prefill_rows: int
    method: Method
    program: Program
    params: Params


def methods(
    params: Params, method: str | Method | Table, rows: int, temperature: float
) -> dict[int, Method]:
    """Returns the checked methods by batch size, in rising order up to `rows`.

    Args:
        params: the model.
        method: one method, used for the size `rows` only; or a table from batch sizes to methods,
            of which sizes above `rows` are ignored, and whose largest remaining entry also serves
            `rows`; or "auto", the table of all stored tunings for sizes up to `rows`.
        rows: the largest batch size.
        temperature: temperature of the requests; tunings for 0 and for more than 0 are separate.

    Raises:
        ValueError: every size in the table is above `rows`, a size is not a whole number above 0,
            or a method cannot decode this model.
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
    """Returns one stage for each entry of `table`, the result of `methods`, in the same order."""
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
    """Returns the same stages with programs that report log-probabilities."""
    return tuple(
        dataclasses.replace(
            stage, program=dataclasses.replace(stage.program, logprobs=MOST_LOGPROBS)
        )
        for stage in stages
    )


def wanted(
    stages: Sequence[Stage], now: Stage, left: Sequence[int], waiting: int, passes: int
) -> Stage:
    """Returns the stage for the next chunk, by the rule in the docstring of `Batcher`.

    Args:
        stages: all stages, in rising order of size.
        now: the current stage.
        left: number of tokens up to its limit, for each request in a row.
        waiting: number of requests without a row.
        passes: passes of the batch since it entered the current stage.
    """
    load = len(left) + waiting
    stage = next((stage for stage in stages if stage.rows >= load), stages[-1])
    cost = MOVE * len(left)
    pays = not left or min(passes, max(left)) >= cost
    return stage if load and (stage.rows > now.rows or pays) else now


def pause(
    stages: Sequence[Stage], now: Stage, live: int, waiting: int, passes: int
) -> tuple[int, int]:
    """Returns after how many rounds, or with how many rows done, the host checks the batch again.

    The arguments are those of `wanted`, but `live`, the number of requests in rows (at least 1),
    replaces `left`.
    """
    smaller = max((stage.rows for stage in stages if stage.rows < now.rows), default=0)
    free = now.rows - live
    if waiting:
        return _FOREVER, min(free + min(waiting, now.prefill_rows), now.rows)
    if live > smaller:  # nothing waits: free rows are useful only once the batch can shrink
        return _FOREVER, now.rows - smaller
    # The batch fits the smaller size. The rule in `wanted` allows the move after `wait` passes, and
    # earlier if a request finishes first, because fewer requests then move.
    wait = MOVE * live - passes
    return wait if wait > 0 else _FOREVER, free + 1


def check_count(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is a whole number above 0."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r}: must be a whole number above 0")
