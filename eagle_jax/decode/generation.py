"""What decoding returns: `Generation`, its `Statistics`, and log-probabilities."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np

from eagle_jax.decode import display
from eagle_jax.text import Tokenizer


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Token counts, acceptance statistics and wall-clock times of a generation.

    Attributes:
        new_tokens: committed tokens of each row, including the end token.
        rounds: target passes over a tree, for each row; the prefill does not count.
        tau: acceptance length τ over all rows: committed tokens per round, including the bonus
            token of every round, so vanilla decoding has 1.
        accepted_per_depth: share of rounds that committed a drafted token at depth 1, 2, ...
        compile_seconds, prefill_seconds, decode_seconds: wall-clock time of each phase.
        tokens_per_second: committed tokens of all rows divided by `decode_seconds`.
        device: name of the device.
        method: the decoding method, written as options of `eagle-jax generate`.
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

    def __repr__(self) -> str:
        return display.short_statistics(self)

    def json(self) -> str:
        """Returns the statistics as one line of JSON."""
        return json.dumps(dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """Log-probabilities at one position of an answer, from the target's raw logits.

    Attributes:
        token: the token of the answer.
        logprob: its log-probability, before any sampling setting (also before the temperature).
        top: the likeliest tokens at this position with their log-probabilities, likeliest first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Generation:
    """The answer to one prompt, or to a batch; for a batch every field but `statistics` is a list.

    Two generations are equal if they have the same `text`, `tokens` and `finish`.

    Attributes:
        text: decoded answer without special tokens and without the stop string; None if the model
            has no tokenizer.
        tokens: [n] ids of the answer, including its end token.
        statistics: statistics of the whole call.
        finish: "stop" (an end token or a stop string), "length" (`max_new_tokens` or the context),
            or None while the answer is unfinished.
        logprobs: one `TokenLogprob` per token if `SamplingParams.logprobs` is set, else None.
        drafted: [n] bool, True for each drafted token that the target accepted; False for the
            bonus token that the target adds in every round.
        tokenizer: the model's tokenizer; notebooks use it to highlight the drafted text.
    """

    text: Any
    tokens: Any
    statistics: Statistics
    finish: Any = None
    logprobs: Any = None
    drafted: Any = None
    tokenizer: Tokenizer | None = None

    def __repr__(self) -> str:
        return display.short_generation(self.text, self.tokens, self.statistics)

    def _repr_html_(self) -> str | None:
        """Returns HTML for notebooks: the answers, with their drafted text highlighted."""
        if self.tokenizer is None or self.drafted is None:
            return None
        caption = display.caption(self.statistics)
        if isinstance(self.text, str):
            return display.markup(self.tokenizer, self.text, self.tokens, self.drafted, caption)
        rows = zip(self.text, self.tokens, self.drafted, strict=True)
        parts = [display.markup(self.tokenizer, *row, "") for row in rows]
        return "<hr>".join([*parts, display.markup(self.tokenizer, "", [], [], caption)])

    __hash__ = None  # type: ignore[assignment]  # arrays have no hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Generation):
            return NotImplemented
        return (self.text, self.finish, _plain(self.tokens)) == (
            other.text,
            other.finish,
            _plain(other.tokens),
        )


def _plain(tokens: Any) -> Any:
    if isinstance(tokens, list | tuple) and any(isinstance(row, np.ndarray) for row in tokens):
        return [np.asarray(row).tolist() for row in tokens]
    return np.asarray(tokens).tolist()
