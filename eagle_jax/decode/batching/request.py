"""The data types of a batcher: requests, pieces of their answers, and statistics."""

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
    """The part of an answer that one chunk added; joined, a request's pieces are its answer.

    Attributes:
        request: the request's number, which `submit` returned.
        text: new text of the answer that no stop string can change; None without a tokenizer.
        tokens: [n] newly committed ids, including the end token.
        finish: "stop" (an end token or a stop string), "length" (the request's limit or the
            context), or None while the answer is unfinished.
        rounds: target passes of this request so far.
        logprobs: one `TokenLogprob` per token if the request's settings ask for them, else None.
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
    """The totals of a batcher since it was made, and its current state.

    Attributes:
        waiting, occupied: requests that are now in the queue, and in rows.
        rows: current batch size.
        finished: requests whose answers are complete.
        new_tokens: committed tokens of all requests.
        rounds: target passes, counted once for every request that took part.
        passes: target passes of the whole batch.
        moves: changes of the batch size while requests were in rows.
        tau: acceptance length τ: `new_tokens` divided by `rounds`.
        occupancy: mean share of the batch's rows that held a request during a pass.
        compile_seconds, prefill_seconds, decode_seconds: wall-clock time of each phase.
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
    """The fields of the engine's `State` that the host reads after a chunk."""

    tokens: np.ndarray
    length: np.ndarray
    done: np.ndarray
    rounds: np.ndarray
    drafted: np.ndarray
    logprobs: Logprobs | None

    @classmethod
    def of(cls, state: State) -> Read:
        """Reads the fields in one transfer from the device."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(*jax.device_get([getattr(state, name) for name in names]))


@dataclasses.dataclass(eq=False)
class Request:
    """A request that waits or is being decoded; lengths are in tokens.

    Attributes:
        id: its number.
        text: [n] tokens for its next prefill: the prompt, and after a move also the answer so far.
        prompt: length of its prompt.
        limit: length of prompt and answer at which it ends.
        sampling: its settings, resolved for the model.
        ends: tokens that end its answer.
        answer: the decoder of its answer's text.
        seen: length of the prompt and of the part of the answer that was handed out.
        rounds: target passes so far, in all rows that it has occupied.
        row_rounds: target passes so far in its current row.
        cancelled: whether its caller has cancelled it.
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
        """Returns the piece that the last chunk added to the answer, up to a stop string."""
        start, end, done = self.seen, int(read.length[row]), bool(read.done[row])
        took = int(read.rounds[row]) - self.row_rounds
        text = self.answer.feed(read.tokens[row, start:end].tolist(), done)
        if self.answer.stopped:  # rounds after the stop do not count
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
    """Returns a placeholder request with a prompt of `prompt` zeros and no answer to decode."""
    text = np.zeros(prompt, np.int32)
    return Request(-1, text, prompt, prompt, sampling or SamplingParams(), (), Answer(None), prompt)


def sampling_of(
    requests: Sequence[Request | None], rows: int, vocabulary: Vocabulary, capacities: Capacities
) -> Sampling:
    """Returns the settings of `rows` rows as host arrays; `requests` occupy the first of them."""
    found = [request or nobody(0) for request in [*requests, *[None] * (rows - len(requests))]]
    settings = [request.sampling for request in found]
    return Sampling.of(settings, vocabulary, [request.prompt for request in found], capacities)
