"""Continuous batching: waiting prompts get free rows between two chunks of the loop.

    batcher = Batcher(params, method="eagle", rows=8)
    for question in questions:
        batcher.submit(question)
    for piece in batcher.run():
        print(piece.request, piece.text, piece.finish)

The batch has one shape at a time; rows without a request are marked as done. A new prompt is
prefilled separately, and its state replaces that of a finished row. With a table of methods the
batch shrinks and grows with the load (`eagle_jax.decode.batching.schedule`): a request moves by
prefilling its prompt and its answer so far, which changes nothing since noise is keyed by position.
Every answer therefore equals that of `generate` with the same seed, whatever else is decoded.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import queue
import threading
from collections.abc import Generator, Sequence
from typing import Any

import jax

from eagle_jax.checks import check_flag, check_whole
from eagle_jax.decode import executables
from eagle_jax.decode.batching.request import (
    BatcherStatistics,
    Piece,
    Read,
    Request,
    nobody,
    sampling_of,
)
from eagle_jax.decode.batching.schedule import (
    Stage,
    Table,
    check_count,
    methods,
    pause,
    reporting,
    stages,
    wanted,
)
from eagle_jax.decode.method import Method
from eagle_jax.decode.program import bucket_prompt
from eagle_jax.decode.prompts import encode
from eagle_jax.decode.sampling import Capacities, Sampling, SamplingParams, Vocabulary, rows_of
from eagle_jax.decode.sampling.stop import Answer
from eagle_jax.decode.session import check_params
from eagle_jax.params import Params


class Batcher:
    """A batch of up to `rows` rows that requests enter and leave while others are decoded.

    Any thread may call `submit` and `cancel`; only one at a time `step`, `run`, `warm_up`.

    The batch has one of the table's sizes, with that size's method: the smallest that holds all
    requests, or else `rows`. It grows at once when prompts wait and no row is free. It shrinks when
    a smaller size holds all requests and the change pays off: it prefills each request in a row
    anew, which counts as 8 passes (`schedule.MOVE`). With n requests in rows, the last change must
    therefore be at least 8 n passes ago, and one request must have at least 8 n tokens left to its
    limit. An empty batch changes its size at once.
    """

    def __init__(
        self,
        params: Params,
        *,
        method: str | Method | Table = "eagle",
        rows: int = 8,
        max_prompt: int = 512,
        max_new_tokens: int = 256,
        sampling: SamplingParams | None = None,
        chunk: int = 16,
        prefill_rows: int = 1,
        waiting: int = 1024,
    ) -> None:
        """Checks the arguments and allocates the largest batch.

        Args:
            params: from `eagle_jax.load`.
            method: as in `generate`, or a table from batch sizes to methods such as `{1: "eagle2",
                4: "eagle", 8: "vanilla"}`. The batch may have any of its sizes up to `rows`, and
                `rows` itself, which without an entry uses the method of the next smaller size.
                "auto" is the table that `python -m eagle_jax.tune --batch-size 1 2 4 8` stored; it
                must have an entry for `rows`.
            rows: b, the largest number of requests decoded together.
            max_prompt: longest prompt, in tokens. With `max_new_tokens` it sets the cache's size.
            max_new_tokens: longest answer; a request may ask for less.
            sampling: settings of requests that have none; greedy by default. Its temperature
                selects the tuned methods of "auto".
            chunk: most rounds between two checks of the batch by the host; new text, new prompts
                and cancellations wait that long. While prompts wait, a finished row ends a chunk.
            prefill_rows: p, prompts prefilled together, at most b - 1 in a batch of b > 1 rows. A
                chunk then ends only when p rows are done. On an accelerator, prefilling several
                short prompts costs little more than prefilling one.
            waiting: length of the queue.

        Raises:
            ValueError: an argument is invalid, as in `generate`.
        """
        check_params(params)
        executables.check_outside_jit(params)
        for name, value in (
            ("rows", rows),
            ("max_prompt", max_prompt),
            ("chunk", chunk),
            ("prefill_rows", prefill_rows),
            ("waiting", waiting),
        ):
            check_count(name, value)
        if prefill_rows > max(rows - 1, 1):
            raise ValueError(
                f"prefill_rows={prefill_rows}: with rows={rows}, use at most {max(rows - 1, 1)}"
            )
        check_whole("max_new_tokens", max_new_tokens)
        [self._default] = rows_of(1, sampling)
        self._vocabulary, self._capacities = Vocabulary.of(params), Capacities()
        self._vocabulary.resolve(self._default)
        table = methods(params, method, rows, self._default.temperature)
        self._sampling: Sampling | None = None  # settings of the current rows; None if outdated
        self._context = params.target_config.max_position_embeddings
        self._max_prompt = min(max_prompt, self._context - 1)
        self._max_new_tokens = int(max_new_tokens)
        self._stages = stages(params, table, self._max_prompt, self._max_new_tokens, prefill_rows)
        if self._default.logprobs is not None:
            self._stages = reporting(self._stages)
        self._params = self._stages[-1].params  # keeps no draft that is not used
        self._chunk, self._longest_queue = chunk, waiting
        self._clock = executables.Clock()

        self._lock = threading.Lock()
        self._ids = itertools.count()
        self._queue: collections.deque[Request] = collections.deque()
        self._requests: dict[int, Request] = {}  # requests in the queue and in rows
        self._pieces: collections.deque[Piece] = collections.deque()  # pieces to hand out
        self._finished = self._tokens = self._rounds = self._passes = self._moves = 0
        self._places = 0  # sum of the batch sizes of all passes
        self._enter(self._stages[-1])  # the largest, so that a lack of memory shows at once

    def __repr__(self) -> str:
        rows = f"{self._occupied()} of {len(self._rows)} rows occupied"
        return f"Batcher({rows}, {len(self._queue)} waiting)"

    @property
    def method(self) -> Method:
        """The method that decodes at the current batch size."""
        return self._stage.method

    def submit(
        self,
        prompt: Any,
        sampling: SamplingParams | None = None,
        *,
        max_new_tokens: int | None = None,
        raw: bool = False,
        seed: int | None = None,
    ) -> int:
        """Queue a prompt and return the number of the request.

        Args:
            prompt: one prompt, in any form that `generate` takes.
            sampling: its settings; by default the batcher's. Requests with different settings
                share one compiled program. The first request that wants log-probabilities makes the
                batcher compile programs that report them.
            max_new_tokens: longest answer; by default, and at most, the batcher's.
            raw: as in `generate`.
            seed: replaces the seed of the settings.

        Returns:
            The request's number, which its pieces carry.

        Raises:
            ValueError: an argument is invalid, or the prompt is empty or too long.
            queue.Full: the queue is full; try again after a `step`.
        """
        check_flag("raw", raw)
        ids = encode(self._params, prompt, raw)
        if len(ids) > self._max_prompt:
            raise ValueError(
                f"prompt: {len(ids)} tokens, and this batcher takes max_prompt={self._max_prompt}; "
                "shorten it or raise max_prompt"
            )
        [sampling] = [self._default] if sampling is None else rows_of(1, sampling)
        if seed is not None:
            sampling = dataclasses.replace(sampling, seed=seed)
        sampling = self._vocabulary.resolve(sampling)
        new = self._max_new_tokens if max_new_tokens is None else max_new_tokens
        check_count("max_new_tokens", new)
        if new > self._max_new_tokens:
            raise ValueError(
                f"max_new_tokens={new}: this batcher allows {self._max_new_tokens}; ask for less"
            )
        tokenizer = self._params.tokenizer
        with self._lock:
            if len(self._queue) >= self._longest_queue:
                raise queue.Full(f"waiting={self._longest_queue}: the queue is full; try again")
            request = Request(
                id=next(self._ids),
                text=ids,
                prompt=len(ids),
                limit=min(len(ids) + int(new), self._context),
                sampling=sampling,
                ends=self._vocabulary.ends(sampling),
                answer=Answer(tokenizer, sampling.stop, sampling.min_tokens),
                seen=len(ids),
            )
            self._queue.append(request)
            self._requests[request.id] = request
        return request.id

    def cancel(self, request: int) -> bool:
        """Cancel a request: none of its pieces is handed out, and the next `step` frees its row.

        Returns:
            False if there is no such request, or its last piece was already handed out.
        """
        with self._lock:
            kept = [piece for piece in self._pieces if piece.request != request]
            known = len(kept) < len(self._pieces)
            self._pieces = collections.deque(kept)
            found = self._requests.pop(request, None)
            if found is None:
                return known
            found.cancelled = True
            if found in self._queue:
                self._queue.remove(found)
        return True

    def step(self) -> list[Piece]:
        """Give free rows to waiting prompts and decode one chunk, at the size that fits the load.

        Returns:
            Pieces that an unfinished `run` has not handed out, then the new piece of each request
            in a row; an empty list if there is no request.
        """
        self._decode_chunk()
        with self._lock:
            pieces = list(self._pieces)
            self._pieces.clear()
        return pieces

    def run(self) -> Generator[Piece]:
        """Yields pieces until no request is left; new requests may be submitted meanwhile.

        A loop over it may stop at any piece: the next `run` or `step` hands out those that follow.
        """
        while self._pieces or self._requests:
            if not self._pieces:
                self._decode_chunk()
            while (piece := self._next_piece()) is not None:
                yield piece

    def _next_piece(self) -> Piece | None:
        with self._lock:
            return self._pieces.popleft() if self._pieces else None

    def _decode_chunk(self) -> None:
        """Decodes one chunk and appends its pieces to `_pieces`."""
        self._drop_cancelled()
        left = [request.limit - request.seen for request in self._rows if request]
        here = self._passes - self._entered
        self._report_logprobs()
        stage = wanted(self._stages, self._stage, left, len(self._queue), here)
        if stage is not self._stage:
            self._move(stage)
        while group := self._next_group():
            self._insert(group)
        live, here = self._occupied(), self._passes - self._entered
        if not live:
            return
        rounds, enough = pause(self._stages, stage, live, len(self._queue), here)
        self._state = executables.advance(
            stage.program,
            stage.params,
            self._state,
            self._arrays(),
            self._clock,
            min(rounds, self._chunk),
            enough,
        )
        self._collect()

    def warm_up(self, *sampling: SamplingParams) -> None:
        """Compile programs now; otherwise the first batch or prompt of each size takes seconds.

        Args:
            *sampling: settings that requests will have, besides the batcher's own. Every batch size
                has up to four programs: greedy or sampling, with or without filters.
        """
        longest = self._max_prompt
        if len(self._stages) > 1:  # a request that moves prefills its answer too
            longest = min(longest + self._max_new_tokens, self._context) - 1
        sizes = {min(bucket_prompt(length + 1), longest) for length in range(longest)}
        before, live = self._stage, self._leave()
        for stage in (*(stage for stage in self._stages if stage is not before), before):
            self._enter(stage)
            for size in sorted(sizes):
                self._prefill([nobody(size)], [stage.rows])
            for settings in (self._default, *sampling):
                arrays = self._arrays_of([nobody(1, self._vocabulary.resolve(settings))])
                self._state = executables.advance(
                    stage.program, stage.params, self._state, arrays, self._clock, 0
                )
            if stage is not before:
                del self._state
        self._insert_all(live)

    def statistics(self) -> BatcherStatistics:
        """Returns the statistics of everything since this batcher was made."""
        return BatcherStatistics(
            waiting=len(self._queue),
            occupied=self._occupied(),
            rows=self._stage.rows,
            finished=self._finished,
            new_tokens=self._tokens,
            rounds=self._rounds,
            passes=self._passes,
            moves=self._moves,
            tau=self._tokens / max(self._rounds, 1),
            occupancy=self._rounds / max(self._places, 1),
            compile_seconds=self._clock.compile,
            prefill_seconds=self._clock.prefill,
            decode_seconds=self._clock.decode,
        )

    def _occupied(self) -> int:
        return sum(request is not None for request in self._rows)

    def _drop_cancelled(self) -> None:
        """Frees the rows of cancelled requests, and marks them as done on the device."""
        rows = [i for i, request in enumerate(self._rows) if request and request.cancelled]
        if not rows:
            return
        self._state, self._sampling = executables.end_rows(self._state, rows), None
        for row in rows:
            self._rows[row] = None

    def _move(self, stage: Stage) -> None:
        live = self._leave()
        self._enter(stage)
        self._insert_all(live)
        self._moves += bool(live)

    def _report_logprobs(self) -> None:
        """Switches to programs that report log-probabilities once a request wants them."""
        with self._lock:
            asked = any(request.sampling.logprobs is not None for request in self._queue)
        if asked and self._stage.program.logprobs is None:
            at = self._stages.index(self._stage)
            self._stages = reporting(self._stages)
            self._move(self._stages[at])

    def _arrays(self) -> Sampling:
        """Returns the sampling settings of all rows, on the device."""
        if self._sampling is None:
            self._sampling = self._arrays_of(self._rows)
        return self._sampling

    def _arrays_of(self, requests: Sequence[Request | None]) -> Sampling:
        arrays = sampling_of(requests, len(self._rows), self._vocabulary, self._capacities)
        return executables.placed(self._params, arrays)

    def _leave(self) -> list[Request]:
        """Returns the requests in rows with their text so far, and frees the batch's memory."""
        tokens, live = jax.device_get(self._state.tokens), []
        for row, request in enumerate(self._rows):
            if request is not None and not request.cancelled:
                request.text = tokens[row, : request.seen].copy()
                live.append(request)
        del self._state
        return live

    def _enter(self, stage: Stage) -> None:
        """Allocates an empty batch of this size."""
        self._stage, self._entered = stage, self._passes
        self._rows: list[Request | None] = [None] * stage.rows
        self._sampling = None
        self._state = executables.vacant(stage.program, stage.params, stage.rows, self._clock)

    def _next_group(self) -> list[Request]:
        """Takes waiting requests from the queue: one per free row, at most `prefill_rows`."""
        free = len(self._rows) - self._occupied()
        with self._lock:
            count = min(self._stage.prefill_rows, free, len(self._queue))
            return [self._queue.popleft() for _ in range(count)]

    def _insert_all(self, requests: list[Request]) -> None:
        for first in range(0, len(requests), self._stage.prefill_rows):
            self._insert(requests[first : first + self._stage.prefill_rows])

    def _insert(self, group: list[Request]) -> None:
        """Give free rows to a group of at most `prefill_rows` requests."""
        free = [row for row, request in enumerate(self._rows) if request is None][: len(group)]
        for row, request in zip(free, group, strict=True):
            self._rows[row], request.row_rounds = request, 0
        self._sampling = None
        self._prefill(group, free)

    def _prefill(self, group: list[Request], rows: list[int]) -> None:
        """Prefills a group, padded to `prefill_rows`.

        Padding repeats the first request with an out-of-range row, which is dropped.
        """
        stage = self._stage
        missing = stage.prefill_rows - len(group)
        group, rows = group + group[:1] * missing, rows + [stage.rows] * missing
        self._state = executables.replace_rows(
            stage.program,
            stage.params,
            self._state,
            rows,
            [request.text for request in group],
            [request.limit for request in group],
            [request.sampling.seed for request in group],
            self._clock,
        )

    def _collect(self) -> None:
        """Makes a piece from every row's new tokens and frees the rows that are done."""
        state, passes, stopped = self._state, 0, []
        read = Read.of(state)
        for row, request in enumerate(self._rows):
            if request is None or request.cancelled:
                continue
            before = request.rounds
            # The row that finished last took part in all passes.
            passes = max(passes, int(read.rounds[row]) - request.row_rounds)
            piece = request.take(row, read)
            self._tokens += len(piece.tokens)
            self._rounds += request.rounds - before
            if piece.finish:
                stopped += [row] * (not read.done[row])
                self._rows[row] = self._sampling = None
                self._finished += 1
            with self._lock:
                if not request.cancelled:  # another thread may have cancelled it meanwhile
                    self._pieces.append(piece)
                if piece.finish:
                    self._requests.pop(request.id, None)
        if stopped:
            self._state = executables.end_rows(self._state, stopped)
        self._passes += passes
        self._places += passes * len(self._rows)
