"""What a batcher holds and hands out: requests, pieces of their answers, and its statistics."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from eagle_jax.decode.generation import TokenLogprob
from eagle_jax.decode.program import Logprobs, State
from eagle_jax.decode.sampling import Capacities, Sampling, SamplingParams, Vocabulary
from eagle_jax.decode.sampling.stop import Answer
from eagle_jax.decode.session import finish_of, run_lengths, token_logprobs


@dataclasses.dataclass(frozen=True)
class Piece:
    """What a request got in one chunk. Joined, a request's pieces are the whole answer.

    Attributes:
        request: what `submit` returned.
        text: the newly certain part of the answer; none without tokenizer.
        tokens: [n] newly committed ids, the end token included.
        finish: "stop" (an end token or a stop string), "length" (the request's limit or the
            context), or None while the answer goes on.
        rounds: target passes of this request so far.
        logprobs: a `TokenLogprob` per token, where the request's settings ask for them.
        drafted: [n] bool, whether each token was a draft that the target accepted.
    """

    request: int
    text: str | None
    tokens: np.ndarray
    finish: str | None
    rounds: int
    logprobs: list[TokenLogprob] | None = None
    drafted: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class BatcherStatistics:
    """What a batcher has done so far, and what it is at.

    Attributes:
        waiting, occupied: requests in the queue and in rows, now.
        rows: of the batch, now.
        finished: requests answered to their end.
        new_tokens: committed tokens of all requests.
        rounds: passes over a request's tree, of all requests.
        passes: rounds of the whole batch.
        moves: changes of the batch size that took requests along.
        tau: mean acceptance length, `new_tokens` per `rounds`.
        occupancy: share of a pass's rows that had a request, on average.
        compile_seconds, prefill_seconds, decode_seconds: wall clock, apart from each other.
    """

    waiting: int
    occupied: int
    rows: int
    finished: int
    new_tokens: int
    rounds: int
    passes: int
    moves: int
    tau: float
    occupancy: float
    compile_seconds: float
    prefill_seconds: float
    decode_seconds: float


@dataclasses.dataclass(frozen=True)
class Read:
    """What the host reads of the engine's state after a chunk; fields as in `State`."""

    tokens: np.ndarray
    length: np.ndarray
    done: np.ndarray
    rounds: np.ndarray
    drafted: np.ndarray
    logprobs: Logprobs | None

    @classmethod
    def of(cls, state: State) -> Read:
        """One transfer from the device."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(*jax.device_get([getattr(state, name) for name in names]))


@dataclasses.dataclass(eq=False)
class Request:
    """A request on its way.

    Attributes:
        id: its number.
        text: [n] what its next prefill takes: the prompt and, in a move, all that was committed.
        prompt: length of its prompt.
        limit: length of the text at which it ends.
        sampling: its settings, resolved for the model.
        ends: tokens that end its answer.
        answer: its text so far.
        seen: length of its text that was handed out.
        rounds: target passes so far, in all rows that it had.
        row_rounds: of these, in the row that it has.
        cancelled: its caller no longer wants it.
    """

    id: int
    text: np.ndarray
    prompt: int
    limit: int
    sampling: SamplingParams
    ends: tuple[int, ...]
    answer: Answer
    seen: int
    rounds: int = 0
    row_rounds: int = 0
    cancelled: bool = False

    def take(self, row: int, read: Read) -> Piece:
        """What the chunk added to the answer, up to a stop string."""
        start, end, done = self.seen, int(read.length[row]), bool(read.done[row])
        took = int(read.rounds[row]) - self.row_rounds
        text = self.answer.feed(read.tokens[row, start:end].tolist(), done)
        if self.answer.stopped:  # rounds behind the stop do not count
            end = self.prompt + self.answer.tokens
            took = len(run_lengths(read.drafted[row, start:end]))
        place = slice(start, end)
        tokens, drafted = read.tokens[row, place].copy(), read.drafted[row, place].copy()
        self.seen, self.row_rounds = end, int(read.rounds[row])
        self.rounds += took
        finish = logprobs = None
        if done or self.answer.stopped:
            finish = finish_of(tokens, self.ends, self.answer.stopped)
        if read.logprobs is not None and self.sampling.logprobs is not None:
            logprobs = token_logprobs(
                read.tokens, read.logprobs, row, place, self.sampling.logprobs
            )
        return Piece(self.id, text, tokens, finish, self.rounds, logprobs, drafted)


def nobody(prompt: int, sampling: SamplingParams | None = None) -> Request:
    """A request that stands for none."""
    text = np.zeros(prompt, np.int32)
    return Request(-1, text, prompt, prompt, sampling or SamplingParams(), (), Answer(None), prompt)


def sampling_of(
    requests: Sequence[Request | None], rows: int, vocabulary: Vocabulary, capacities: Capacities
) -> Sampling:
    """The settings of `rows` rows, of which the first have these requests, on the host."""
    found = [request or nobody(0) for request in [*requests, *[None] * (rows - len(requests))]]
    settings = [request.sampling for request in found]
    return Sampling.of(settings, vocabulary, [request.prompt for request in found], capacities)
