"""Session: one decoding of a batch of prompts, step by step.

`generate` runs a session to its end, `stream` chunk by chunk; tuning and evaluation use it too.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any, Unpack

import jax
import numpy as np

from eagle_jax.checks import check_flag, check_whole
from eagle_jax.decode import executables, tuning_store
from eagle_jax.decode.generation import Generation, Statistics, TokenLogprob
from eagle_jax.decode.method import Method
from eagle_jax.decode.method_cli import spell
from eagle_jax.decode.program import (
    EXACT_DEPTH,
    EXACT_ROWS,
    Logprobs,
    Program,
    bucket_prompt,
    capacity,
    opening,
)
from eagle_jax.decode.prompts import Prompt, encode_all
from eagle_jax.decode.registry import AUTO, METHODS, unknown
from eagle_jax.decode.sampling import Sampling, SamplingParams, Settings, Vocabulary, rows_of
from eagle_jax.decode.sampling.stop import Answer
from eagle_jax.decode.tree import MOST_NODES
from eagle_jax.params import Params

# If tau stays below `_HARDLY` for `_FIRST_ROUNDS` rounds, the draft is probably for another target.
_FIRST_ROUNDS = 32
_HARDLY = 1.05
_STOP_ROUNDS = 16  # rounds between two searches for stop strings, which only the host can do


class Session:
    """One decoding of a batch: the checked arguments, the engine's state and the answers so far.

    Attributes:
        params: the target and the method's draft.
        prompts: token ids of every row.
        batched: whether the caller passed a batch; if not, there is one row.
        rows: the sampling settings of every row.
        method: the decoding method.
        program: the static settings of the compiled loop.
        state: the engine's state.
        sampling: the sampling settings as arrays for the loop.
        clock: seconds spent so far, by phase.
    """

    def __init__(
        self,
        params: Params,
        prompt: Prompt,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        method: str | Method = "eagle",
        max_new_tokens: int = 256,
        raw: bool = False,
        exact: bool = False,
        **settings: Unpack[Settings],
    ) -> None:
        """Checks the arguments, which are those of `generate`, and prefills the prompts."""
        check_params(params)
        check_flag("raw", raw)
        executables.check_outside_jit(params, prompt)
        self.prompts, self.batched = encode_all(params, prompt, raw)
        vocabulary = Vocabulary.of(params)
        rows = rows_of(len(self.prompts), sampling, settings)
        self.rows = [vocabulary.resolve(row) for row in rows]
        hottest = max(row.temperature for row in self.rows)
        self.method = check_method(params, method, len(self.prompts), hottest, exact)
        check_whole("max_new_tokens", max_new_tokens)
        context = params.target_config.max_position_embeddings
        limits = [min(len(p) + max_new_tokens, context) for p in self.prompts]
        lengths = [len(prompt) for prompt in self.prompts]
        asked = [row.logprobs for row in self.rows if row.logprobs is not None]
        self.program = make_program(
            params,
            self.method,
            max(lengths),
            max_new_tokens,
            exact=exact,
            logprobs=max(asked) if asked else None,
        )
        self.slots = self.program.slots
        if not exact:  # growth depends on the method, so `exact` allocates all slots at once
            slots = opening(bucket_prompt(max(lengths)), self.slots, self.method.depth)
            self.program = dataclasses.replace(self.program, slots=slots)
        self.sampling = Sampling.of(self.rows, vocabulary, lengths)
        self._ends = [vocabulary.ends(row) for row in self.rows]
        self.params = params.with_draft(self.method.draft)
        tokenizer = params.tokenizer
        self._texts = [Answer(tokenizer, row.stop, row.min_tokens) for row in self.rows]
        self._parts: list[list[str]] = [[] for _ in self.rows]
        self.stopping = any(row.stop for row in self.rows)
        self.warned = False
        self.clock = executables.Clock()
        self.state = executables.start(
            self.program, self.params, self.prompts, limits, [r.seed for r in self.rows], self.clock
        )

    def __repr__(self) -> str:
        statistics = self.statistics()
        state = "finished" if self.finished() else "going on"
        tokens = sum(statistics.new_tokens)
        return f"Session({len(self.prompts)} prompts, {tokens} tokens so far, {state})"

    def warn(self) -> None:
        """Warns once per generation if the draft seems to belong to another target."""
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
        """Decode at most `max_rounds` rounds; fewer if the cache must grow first."""
        self.program, self.state = executables.grow(
            self.program, self.params, self.state, self.slots, self.clock
        )
        self.state = executables.advance(
            self.program, self.params, self.state, self.sampling, self.clock, max_rounds
        )

    def run(self) -> None:
        """Decode until every row is finished."""
        while not self.finished():
            self.advance(*[_STOP_ROUNDS] * self.stopping)
            if self.stopping:
                self.read()

    def read(self) -> list[tuple[np.ndarray, str | None]]:
        """Returns the token ids and the text that every row gained since the last call.

        The text leaves out what may still become a stop string. Only this method finds stop
        strings, so a session whose rows have stop strings must call it after every `advance`. It
        marks the rows that a stop string ends as done.
        """
        tokens, length, done = jax.device_get(
            (self.state.tokens, self.state.length, self.state.done)
        )
        out, ended = [], []
        for row, (answer, prompt) in enumerate(zip(self._texts, self.prompts, strict=True)):
            before = answer.tokens
            new = np.array([], tokens.dtype)
            text = "" if self.params.tokenizer is not None else None
            if not answer.stopped:
                new = tokens[row, len(prompt) + before : length[row]]
                text = answer.feed(new.tolist(), bool(done[row]))
                new = new[: answer.tokens - before]
                ended += [row] * (answer.stopped and not done[row])
            self._parts[row].append(text or "")
            out.append((new, text))
        if ended:
            self.state = executables.end_rows(self.state, ended)
        return out

    def finished(self) -> bool:
        """Returns whether every row has its complete answer."""
        return bool(np.all(np.asarray(self.state.done)))

    def answers(self) -> list[np.ndarray]:
        """Returns the token ids of every row's answer so far."""
        tokens = np.asarray(jax.device_get(self.state.tokens))
        return [tokens[row, place] for row, place in enumerate(self._places())]

    def finishes(self) -> list[str | None]:
        """Returns why each row's answer ended: "stop", "length", or None if it is unfinished."""
        done = np.asarray(jax.device_get(self.state.done))
        return [
            finish_of(answer, ends, stopped.stopped) if end else None
            for answer, ends, stopped, end in zip(
                self.answers(), self._ends, self._texts, done, strict=True
            )
        ]

    def drafted(self) -> list[np.ndarray]:
        """Returns, for every token of each answer so far, whether it was an accepted draft."""
        drafted = np.asarray(jax.device_get(self.state.drafted))
        return [drafted[row, place] for row, place in enumerate(self._places())]

    def logprobs(self, seen: int = 0) -> list[list[TokenLogprob] | None]:
        """Returns each answer's log-probabilities from token `seen` on; None for other rows."""
        if self.state.logprobs is None:
            return [None] * len(self.rows)
        tokens, found = jax.device_get((self.state.tokens, self.state.logprobs))
        return [
            None
            if wanted.logprobs is None
            else token_logprobs(
                tokens, found, row, slice(place.start + seen, place.stop), wanted.logprobs
            )
            for row, (place, wanted) in enumerate(zip(self._places(), self.rows, strict=True))
        ]

    def _places(self) -> list[slice]:
        """Returns each answer's slice of the token buffer; it ends at a stop string."""
        length = np.asarray(jax.device_get(self.state.length))
        return [
            slice(len(prompt), len(prompt) + answer.tokens if answer.stopped else int(end))
            for prompt, answer, end in zip(self.prompts, self._texts, length, strict=True)
        ]

    def statistics(self) -> Statistics:
        """Returns the statistics of everything decoded so far."""
        rounds, accepted = jax.device_get((self.state.rounds, self.state.accepted))
        new = [place.stop - place.start for place in self._places()]
        if any(answer.stopped for answer in self._texts):  # rounds after the stop do not count
            rounds, accepted = rounds.copy(), accepted.copy()
            for row, kept in enumerate(self.drafted()):
                if self._texts[row].stopped:
                    runs = run_lengths(kept)
                    rounds[row] = len(runs)
                    accepted[row] = np.bincount(runs, minlength=accepted.shape[1])
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
        """Returns everything decoded so far as a `Generation`."""
        tokens, tokenizer = self.answers(), self.params.tokenizer
        texts: list[str] | None = None
        if tokenizer is not None:
            texts = (
                ["".join(parts) for parts in self._parts]
                if self.stopping
                else [tokenizer.decode(row.tolist()) for row in tokens]
            )
        found = (tokens, self.finishes(), self.logprobs(), self.drafted())
        if not self.batched:
            text, found = None if texts is None else texts[0], tuple(x[0] for x in found)
        else:
            text = texts
        tokens, finish, logprobs, drafted = found
        return Generation(text, tokens, self.statistics(), finish, logprobs, drafted, tokenizer)


def finish_of(tokens: np.ndarray, ends: Sequence[int], stopped: bool) -> str:
    """Returns why a finished answer ended: "stop" or "length"."""
    return "stop" if stopped or (len(tokens) and tokens[-1] in ends) else "length"


def run_lengths(drafted: np.ndarray) -> list[int]:
    """Returns the number of accepted drafted tokens in every round of an answer.

    `drafted` says which tokens were drafts. A round ends with its bonus token, or with the answer.
    """
    ends = np.flatnonzero(~drafted).tolist()
    if len(drafted) and drafted[-1]:
        ends.append(len(drafted))
    return [end - start - 1 for start, end in zip([-1, *ends], ends, strict=False)]


def token_logprobs(
    tokens: np.ndarray, found: Logprobs, row: int, place: slice, most: int
) -> list[TokenLogprob]:
    """Returns the log-probabilities of one row's tokens at `place`, with `most` alternatives."""
    chosen, ids, top = (x[row, place] for x in (found.chosen, found.ids, found.top))
    return [
        TokenLogprob(
            int(token),
            float(own),
            tuple(zip(i[:most].tolist(), x[:most].tolist(), strict=True)),
        )
        for token, own, i, x in zip(tokens[row, place], chosen, ids, top, strict=True)
    ]


def check_method(
    params: Params, method: str | Method, rows: int, temperature: float, exact: bool = False
) -> Method:
    """Returns the method that decodes a batch, after checking that it works with this model.

    Args:
        params: the model.
        method: a name in `METHODS`, an instance, or "auto" for the stored result of tuning.
        rows: batch size; "auto" selects the method that was tuned for it.
        temperature: the highest temperature of the rows; "auto" distinguishes 0 from more than 0.
        exact: as in `generate`.

    Raises:
        ValueError: the method cannot decode this model; one line.
    """
    if isinstance(method, str) and method == AUTO:
        method = tuning_store.method(params, rows, temperature)
    method = _method(method, params)
    check_flag("exact", exact)
    nodes, depth = EXACT_ROWS, EXACT_DEPTH - 1
    if exact and (method.nodes > nodes or method.depth > depth):
        raise ValueError(
            f"exact=True: passes have {nodes} nodes to depth {depth}, and method "
            f"{type(method).__name__} {method.nodes} to depth {method.depth}; use smaller settings"
        )
    return method


def make_program(
    params: Params,
    method: Method,
    longest: int,
    max_new_tokens: int,
    *,
    exact: bool = False,
    logprobs: int | None = None,
) -> Program:
    """Returns the program that decodes prompts of up to `longest` tokens."""
    context = params.target_config.max_position_embeddings
    new = min(int(max_new_tokens), context)  # no row grows past the context
    depth = EXACT_DEPTH if exact else method.depth
    return Program.of(params, method, capacity(bucket_prompt(longest), new, depth), exact, logprobs)


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
