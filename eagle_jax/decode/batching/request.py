"""What a batcher holds and hands out: requests, pieces of their answers, and its statistics."""

from __future__ import annotations

import dataclasses

import numpy as np

from eagle_jax.decode.generation import TokenLogprob
from eagle_jax.decode.sampling import SamplingParams
from eagle_jax.decode.sampling.stop import Answer


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
