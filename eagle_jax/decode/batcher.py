"""Continuous batching: prompts wait for a row, and get it between two chunks of the loop.

    batcher = Batcher(params, method="eagle", rows=8)
    for question in questions:
        batcher.submit(question)
    for piece in batcher.run():
        print(piece.request, piece.text, piece.finish)

The batch keeps one shape: `rows` rows, of which those without a request are done. A new prompt
runs through a prefill of its own and its state takes the place of a finished row's. So every
answer is that of `generate` alone with the same seed, whatever else is decoded and whenever.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import queue
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from eagle_jax.decode import Options, check_seeds, encode, engine
from eagle_jax.decode.method import Method
from eagle_jax.params import Params
from eagle_jax.text import StreamDecoder


@dataclasses.dataclass(frozen=True)
class Piece:
    """What a request got in one chunk. Joined, a request's pieces are the whole answer.

    Attributes:
        request: what `submit` returned.
        text: the newly certain part of the answer; none without tokenizer.
        tokens: [n] newly committed ids, the end token included.
        finish: "stop" (the model ended its answer), "length" (the request's limit or the context
            did), or none while the answer goes on.
        rounds: target passes of this request so far.
    """

    request: int
    text: str | None
    tokens: np.ndarray
    finish: str | None
    rounds: int


@dataclasses.dataclass(frozen=True)
class BatcherStatistics:
    """What a batcher has done so far, and what it is at.

    Attributes:
        waiting, occupied: requests in the queue and in rows, now.
        finished: requests answered to their end.
        new_tokens: committed tokens of all requests.
        rounds: passes over a request's tree, of all requests.
        passes: rounds of the whole batch.
        tau: mean acceptance length, `new_tokens` per `rounds`.
        occupancy: share of a pass's rows that had a request, on average.
        compile_seconds, prefill_seconds, decode_seconds: wall clock, apart from each other.
    """

    waiting: int
    occupied: int
    finished: int
    new_tokens: int
    rounds: int
    passes: int
    tau: float
    occupancy: float
    compile_seconds: float
    prefill_seconds: float
    decode_seconds: float


@dataclasses.dataclass(eq=False)
class _Request:
    """A request on its way; `seen` is the length of its text that was handed out."""

    id: int
    prompt: np.ndarray
    limit: int
    seed: int
    decoder: StreamDecoder | None
    seen: int
    rounds: int = 0
    cancelled: bool = False


class Batcher:
    """A batch of `rows` rows in which requests come and go.

    `submit` and `cancel` may be called from any thread, `step` and `run` from one at a time.
    """

    def __init__(
        self,
        params: Params,
        *,
        method: str | Method | Mapping[int, str | Method] = "eagle",
        rows: int = 8,
        max_prompt: int = 512,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        ignore_eos: bool = False,
        chunk: int = 16,
        prefill_rows: int = 1,
        waiting: int = 1024,
    ) -> None:
        """Allocates the batch.

        Args:
            params: from `eagle_jax.load`.
            method: as in `generate`, or a table from batch sizes to methods: `method_for` chooses.
            rows: b, requests decoded together.
            max_prompt: longest prompt, in tokens. With `max_new_tokens` it sets the cache's size.
            max_new_tokens: longest answer; a request may ask for less.
            temperature, top_k, top_p, ignore_eos: as in `generate`, for all requests.
            chunk: rounds between two looks at the batch at most, i.e. how long new text, a new
                prompt and a cancellation wait. While prompts wait, a row that is done ends a chunk.
            prefill_rows: p, prompts prefilled together; p rows must then be done to end a chunk.
                On an accelerator a prefill of several short prompts costs little more than of one.
            waiting: length of the queue.

        Raises:
            ValueError: a bad argument, as `generate`.
        """
        for name, value in (
            ("rows", rows),
            ("max_prompt", max_prompt),
            ("chunk", chunk),
            ("prefill_rows", prefill_rows),
            ("waiting", waiting),
        ):
            _check_count(name, value)
        if prefill_rows > max(rows - 1, 1):
            raise ValueError(
                f"prefill_rows={prefill_rows}: with rows={rows}, use at most {max(rows - 1, 1)}"
            )
        if isinstance(method, Mapping):
            method = method_for(method, rows)
        options = Options(method, max_new_tokens, temperature, top_k, top_p, ignore_eos)
        self._settings, self.method = options.check(params, rows)
        self._context = params.target_config.max_position_embeddings
        self._max_prompt = min(max_prompt, self._context - 1)
        self._max_new_tokens = int(max_new_tokens)
        self._program = options.program(params, self.method, self._max_prompt)
        self._params = params.only(self.method.draft)
        self._chunk, self._prefill_rows, self._longest_queue = chunk, prefill_rows, waiting
        self._clock = engine.Clock()

        self._lock = threading.Lock()
        self._ids = itertools.count()
        self._queue: collections.deque[_Request] = collections.deque()
        self._requests: dict[int, _Request] = {}  # waiting and in rows
        self._rows: list[_Request | None] = [None] * rows
        self._finished = self._tokens = self._rounds = self._passes = 0
        nothing = [np.zeros(1, np.int32)] * rows  # prompts at their limit: rows that are done
        self._state = engine.start(
            self._program, self._params, nothing, [1] * rows, [0] * rows, self._clock
        )

    def submit(
        self, prompt: Any, *, seed: int = 0, max_new_tokens: int | None = None, raw: bool = False
    ) -> int:
        """Queue a prompt.

        Args:
            prompt: one, in any form that `generate` takes.
            seed: of its sampling noise.
            max_new_tokens: longest answer; by default, and at most, the batcher's.
            raw: as in `generate`.

        Returns:
            The request's number, by which its pieces are known.

        Raises:
            ValueError: a bad argument, a prompt that is empty or too long.
            queue.Full: as many prompts as may wait do so; try again after a `step`.
        """
        ids = encode(self._params, prompt, raw)
        if len(ids) > self._max_prompt:
            raise ValueError(
                f"prompt: {len(ids)} tokens, and this batcher takes max_prompt={self._max_prompt}; "
                "shorten it or raise max_prompt"
            )
        (seed,) = check_seeds([seed], 1)
        new = self._max_new_tokens if max_new_tokens is None else max_new_tokens
        _check_count("max_new_tokens", new)
        if new > self._max_new_tokens:
            raise ValueError(
                f"max_new_tokens={new}: this batcher allows {self._max_new_tokens}; ask for less"
            )
        tokenizer = self._params.tokenizer
        with self._lock:
            if len(self._queue) >= self._longest_queue:
                raise queue.Full(f"waiting={self._longest_queue}: the queue is full; try again")
            request = _Request(
                id=next(self._ids),
                prompt=ids,
                limit=min(len(ids) + int(new), self._context),
                seed=seed,
                decoder=None if tokenizer is None else StreamDecoder(tokenizer),
                seen=len(ids),
            )
            self._queue.append(request)
            self._requests[request.id] = request
        return request.id

    def cancel(self, request: int) -> bool:
        """Forget a request: its row is free from the next `step` on, which returns nothing of it.

        Returns:
            False if there is no such request, or no more.
        """
        with self._lock:
            found = self._requests.pop(request, None)
            if found is None:
                return False
            found.cancelled = True
            if found in self._queue:
                self._queue.remove(found)
        return True

    def step(self) -> list[Piece]:
        """Give free rows to waiting prompts and decode one chunk.

        Returns:
            What each request in a row got; nothing if there is none.
        """
        self._drop_cancelled()
        while group := self._next_group():
            self._insert(*group)
        before = self._occupied()
        if not before:
            return []
        with self._lock:
            wanted = min(self._prefill_rows, len(self._queue))
        # Without prompts that wait, a free row is of no use to anybody.
        enough = len(self._rows) - before + wanted if wanted else len(self._rows)
        self._state = engine.advance(
            self._program,
            self._params,
            self._state,
            self._settings,
            self._clock,
            self._chunk,
            min(enough, len(self._rows)),
        )
        return self._collect()

    def run(self) -> Iterator[Piece]:
        """Pieces until no request is left; others may be submitted meanwhile."""
        while self._requests:
            yield from self.step()

    def warm_up(self) -> None:
        """Compile every program now: a size of prompts costs its first one seconds otherwise."""
        nobody = [len(self._rows)] * self._prefill_rows
        sizes = {engine.bucket_prompt(length + 1) for length in range(self._max_prompt)}
        for size in sizes:
            idle = _Request(-1, np.zeros(size, np.int32), size, 0, None, 0)
            self._insert([idle] * self._prefill_rows, nobody)
        self._state = engine.advance(
            self._program, self._params, self._state, self._settings, self._clock, 0
        )

    def statistics(self) -> BatcherStatistics:
        """Of everything since this batcher was made."""
        return BatcherStatistics(
            waiting=len(self._queue),
            occupied=self._occupied(),
            finished=self._finished,
            new_tokens=self._tokens,
            rounds=self._rounds,
            passes=self._passes,
            tau=self._tokens / max(self._rounds, 1),
            occupancy=self._rounds / max(self._passes * len(self._rows), 1),
            compile_seconds=self._clock.compile,
            prefill_seconds=self._clock.prefill,
            decode_seconds=self._clock.decode,
        )

    def _occupied(self) -> int:
        return sum(request is not None for request in self._rows)

    def _drop_cancelled(self) -> None:
        """Frees the rows of cancelled requests, on the device too: the loop waits for all rows."""
        rows = [i for i, request in enumerate(self._rows) if request and request.cancelled]
        if not rows:
            return
        done = np.array(self._state.done)
        done[rows] = True
        for row in rows:
            self._rows[row] = None
        # Placed as it was, so that the same program goes on.
        done = jax.device_put(done, self._state.done.sharding)
        self._state = dataclasses.replace(self._state, done=done)

    def _next_group(self) -> tuple[list[_Request], list[int]] | None:
        """Up to `prefill_rows` waiting requests and the rows that are now theirs.

        Padded to that number: with the first request, for a row that there is not.
        """
        free = [i for i, request in enumerate(self._rows) if request is None]
        with self._lock:
            count = min(self._prefill_rows, len(free), len(self._queue))
            group = [self._queue.popleft() for _ in range(count)]
        if not group:
            return None
        rows = free[:count]
        for row, request in zip(rows, group, strict=True):
            self._rows[row] = request
        missing = self._prefill_rows - count
        return group + group[:1] * missing, rows + [len(self._rows)] * missing

    def _insert(self, group: list[_Request], rows: list[int]) -> None:
        self._state = engine.replace_rows(
            self._program,
            self._params,
            self._state,
            rows,
            [request.prompt for request in group],
            [request.limit for request in group],
            [request.seed for request in group],
            self._clock,
        )

    def _collect(self) -> list[Piece]:
        """New tokens of every request in a row; rows that are done become free."""
        state = self._state
        tokens, length, done, rounds = jax.device_get(
            (state.tokens, state.length, state.done, state.rounds)
        )
        pieces, passes = [], 0
        for row, request in enumerate(self._rows):
            if request is None or request.cancelled:
                continue
            new = tokens[row, request.seen : length[row]].copy()
            took = int(rounds[row]) - request.rounds
            request.seen, request.rounds = int(length[row]), int(rounds[row])
            self._tokens, self._rounds = self._tokens + len(new), self._rounds + took
            passes = max(passes, took)  # the row that finished last took part in all of them
            finish = None
            if done[row]:
                finish = "stop" if new[-1] in self._program.eos else "length"
                self._rows[row] = None
                self._finished += 1
                with self._lock:
                    self._requests.pop(request.id, None)
            text = None
            if request.decoder is not None:
                text = request.decoder.feed(new.tolist())
                text += request.decoder.flush() if finish else ""
            pieces.append(Piece(request.id, text, new, finish, request.rounds))
        self._passes += passes
        return pieces


def method_for(table: Mapping[int, str | Method], rows: int) -> str | Method:
    """The method of a table for a batch of `rows`: that of the largest size which is no larger.

    Speculation pays the less, the more rows share a pass: `{1: "eagle2", 4: "eagle", 32:
    "vanilla"}`.

    Raises:
        ValueError: no entry is small enough, or a size is no whole number above 0.
    """
    for size in table:
        _check_count("batch size", size)
    fitting = [size for size in table if size <= rows]
    if not fitting:
        raise ValueError(
            f"method: a table for batch sizes {sorted(table)}, and rows={rows}; add one for 1"
        )
    return table[max(fitting)]


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r}: must be a whole number above 0")
