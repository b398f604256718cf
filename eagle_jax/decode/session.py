"""Session: one decoding of a batch of prompts, step by step.

`generate` runs a session to its end, `stream` chunk by chunk; tuning and evaluation use it too.
"""

from __future__ import annotations

import dataclasses
import json
import operator
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from eagle_jax.checks import check_flag
from eagle_jax.decode import executables, tuning_store
from eagle_jax.decode.method import Method
from eagle_jax.decode.method_cli import spell
from eagle_jax.decode.program import (
    EXACT_DEPTH,
    EXACT_ROWS,
    Program,
    bucket_prompt,
    capacity,
    opening,
)
from eagle_jax.decode.prompts import Prompt, encode_all
from eagle_jax.decode.registry import AUTO, METHODS, unknown
from eagle_jax.decode.sampling import Sampling, sampling
from eagle_jax.decode.tree import MOST_NODES
from eagle_jax.params import Params

# A draft that gets hardly a token accepted in so many rounds is hardly one for this target.
_FIRST_ROUNDS = 32
_HARDLY = 1.05


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What a generation did and what it cost.

    Attributes:
        new_tokens: committed tokens, per row; an end token counts.
        rounds: target passes over a tree, per row (the prompt's pass is not one).
        tau: mean acceptance length over all rows: committed tokens per round, the bonus token of
            every round included, so vanilla's is 1.
        accepted_per_depth: share of rounds that committed a drafted token at depth 1, 2, ...
        compile_seconds, prefill_seconds, decode_seconds: wall clock, apart from each other.
        tokens_per_second: committed tokens of all rows over `decode_seconds`.
        device: what it ran on.
        method: what decoded, as options of `python -m eagle_jax.decode`.
    """

    new_tokens: tuple[int, ...]
    rounds: tuple[int, ...]
    tau: float
    accepted_per_depth: tuple[float, ...]
    compile_seconds: float
    prefill_seconds: float
    decode_seconds: float
    tokens_per_second: float
    device: str
    method: str

    def json(self) -> str:
        """One line of JSON."""
        return json.dumps(dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class Generation:
    """The answer to one prompt, or to a batch.

    Attributes:
        text: decoded answer without special tokens; a list for a batch; none without tokenizer.
        tokens: ids of the answer, its end token included; a list of arrays for a batch.
        statistics: of the whole call.
    """

    text: Any
    tokens: Any
    statistics: Statistics


@dataclasses.dataclass(frozen=True)
class Options:
    """What all rows of a call share; meanings and defaults as in `generate`."""

    method: str | Method = "eagle"
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    ignore_eos: bool = False
    exact: bool = False

    def check(self, params: Params, rows: int = 1) -> tuple[Sampling, Method]:
        """Sampling settings and the method for `rows` rows; a ValueError names what cannot be."""
        settings = sampling(self.temperature, self.top_k, self.top_p)
        new = self.max_new_tokens
        if not isinstance(new, int | np.integer) or isinstance(new, bool) or new < 1:
            raise ValueError(f"max_new_tokens={new!r}: must be a whole number above 0")
        method = self.method
        if isinstance(method, str) and method == AUTO:
            method = tuning_store.method(params, rows, self.temperature)
        method = _method(method, params)
        check_flag("exact", self.exact)
        check_flag("ignore_eos", self.ignore_eos)
        rows, depth = EXACT_ROWS, EXACT_DEPTH - 1
        if self.exact and (method.nodes > rows or method.depth > depth):
            raise ValueError(
                f"exact=True: passes have {rows} nodes to depth {depth}, and method "
                f"{type(method).__name__} {method.nodes} to depth {method.depth}; use smaller "
                "settings"
            )
        return settings, method

    def program(self, params: Params, method: Method, longest: int) -> Program:
        """What decodes prompts of up to `longest` tokens."""
        context = params.target_config.max_position_embeddings
        new = min(int(self.max_new_tokens), context)  # no row grows past the context
        depth = EXACT_DEPTH if self.exact else method.depth
        return Program(
            method,
            params.target_config,
            None if method.draft is None else params.drafts[method.draft].config,
            capacity(bucket_prompt(longest), new, depth),
            () if self.ignore_eos or params.tokenizer is None else params.tokenizer.eos_ids,
            self.exact,
        )


class Session:
    """One generation: checked arguments, the engine's state, and what to report of it."""

    def __init__(
        self,
        params: Params,
        prompt: Prompt,
        options: Options,
        seed: int | Sequence[int],
        raw: bool,
    ) -> None:
        check_params(params)
        check_flag("raw", raw)
        executables.check_outside_jit(params, prompt)
        self.params = params
        self.prompts, self.batched = encode_all(params, prompt, raw)
        self.settings, self.method = options.check(params, len(self.prompts))
        context = params.target_config.max_position_embeddings
        limits = [min(len(p) + options.max_new_tokens, context) for p in self.prompts]
        longest = max(map(len, self.prompts))
        self.program = options.program(params, self.method, longest)
        self.slots = self.program.slots
        if not options.exact:  # caches would grow at other lengths for another method
            slots = opening(bucket_prompt(longest), self.slots, self.method.depth)
            self.program = dataclasses.replace(self.program, slots=slots)
        self.params = params.only(self.method.draft)
        self.warned = False
        self.clock = executables.Clock()
        seeds = check_seeds(seed, len(self.prompts))
        self.state = executables.start(
            self.program, self.params, self.prompts, limits, seeds, self.clock
        )

    def warn(self) -> None:
        """Warns of a draft that seems to be for another target; at most once per generation."""
        if self.method.draft is None or self.warned:
            return
        statistics = self.statistics()
        rounds = sum(statistics.rounds)
        self.warned = rounds >= _FIRST_ROUNDS
        if self.warned and statistics.tau < _HARDLY:
            warnings.warn(
                f"acceptance length {statistics.tau:.2f} over {rounds} rounds (1 is none): is the "
                f"{self.method.draft!r} draft one for this target? "
                "python -m eagle_jax.convert --inspect DRAFT tells what it is",
                stacklevel=3,
            )

    def advance(self, max_rounds: int = 2**31 - 1) -> None:
        """At most `max_rounds`; fewer where the cache has to grow."""
        self.program, self.state = executables.grow(
            self.program, self.params, self.state, self.slots, self.clock
        )
        self.state = executables.advance(
            self.program, self.params, self.state, self.settings, self.clock, max_rounds
        )

    def finished(self) -> bool:
        return bool(np.all(np.asarray(self.state.done)))

    def answers(self) -> list[np.ndarray]:
        tokens, length = jax.device_get((self.state.tokens, self.state.length))
        return [
            row[len(prompt) : end]
            for row, prompt, end in zip(tokens, self.prompts, length, strict=True)
        ]

    def statistics(self) -> Statistics:
        length, rounds, accepted = jax.device_get(
            (self.state.length, self.state.rounds, self.state.accepted)
        )
        new = [int(end) - len(prompt) for end, prompt in zip(length, self.prompts, strict=True)]
        total = max(int(rounds.sum()), 1)
        reached = accepted.sum(axis=0)[::-1].cumsum()[::-1][1:]
        return Statistics(
            new_tokens=tuple(new),
            rounds=tuple(int(r) for r in rounds),
            tau=sum(new) / total,
            accepted_per_depth=tuple(float(r) / total for r in reached),
            compile_seconds=self.clock.compile,
            prefill_seconds=self.clock.prefill,
            decode_seconds=self.clock.decode,
            tokens_per_second=sum(new) / max(self.clock.decode, 1e-9),
            device=executables.device_name(),
            method=spell(self.method),
        )

    def result(self) -> Generation:
        tokens, tokenizer = self.answers(), self.params.tokenizer
        texts = None if tokenizer is None else [tokenizer.decode(t.tolist()) for t in tokens]
        if self.batched:
            return Generation(texts, tokens, self.statistics())
        return Generation(None if texts is None else texts[0], tokens[0], self.statistics())


def _method(method: str | Method, params: Params) -> Method:
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(unknown(method))
        method = METHODS[method]()
    if isinstance(method, type) or not isinstance(method, Method):
        raise ValueError(f"method={method!r}: give a name ({', '.join(METHODS)}) or an instance")
    if method.draft is not None and method.draft not in params.drafts:
        raise ValueError(
            f"method {type(method).__name__}: needs a draft of kind {method.draft!r}, and params "
            f"has {', '.join(sorted(params.drafts)) or 'none'}; load one with draft=DIR"
        )
    if max(method.nodes, method.depth + 1) > MOST_NODES:
        raise ValueError(
            f"method {type(method).__name__}: {method.nodes} nodes to depth {method.depth}; a "
            f"round takes at most {MOST_NODES} either way, use smaller settings"
        )
    method.check(params)
    return method


def check_params(params: Any) -> None:
    """Raises ValueError unless `params` is what `eagle_jax.load` returns."""
    if not isinstance(params, Params):
        given = f" of {params!r}" if isinstance(params, str) else ""
        raise ValueError(
            f"params: is a {type(params).__name__}{given}; give what eagle_jax.load(...) returns"
        )


def check_seeds(seed: int | Sequence[int], rows: int) -> list[int]:
    """One checked seed per row."""
    try:
        given = [seed] if np.ndim(seed) == 0 else seed
        if any(isinstance(value, bool) for value in given):  # type: ignore[union-attr]
            raise TypeError
        if np.ndim(seed) == 0:
            seeds = [operator.index(seed) + row for row in range(rows)]  # type: ignore[arg-type]
        else:
            seeds = [operator.index(value) for value in seed]  # type: ignore[union-attr]
    except TypeError as error:
        raise ValueError(f"seed={seed!r}: give a whole number, or one per row") from error
    if len(seeds) != rows:
        raise ValueError(f"seed={seeds}: {len(seeds)} seeds for {rows} rows; give one per row")
    for value in seeds:
        if not 0 <= value < 2**32:
            raise ValueError(f"seed={value}: must be at least 0 and below 2**32")
    return seeds
