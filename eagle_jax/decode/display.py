"""Answers for people: which characters were drafted, in colour; short texts for a REPL.

Drafted characters come from tokens that the draft proposed and the target accepted; the others are
the target's own, one token a round.
"""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import Iterable
from typing import Any

from eagle_jax.text import StreamDecoder, Tokenizer

_ON, _OFF = "\x1b[48;5;194;38;5;16m", "\x1b[0m"  # black on light green
_STYLE = "background:#cfe8cf;color:#000;border-radius:2px"
_WIDTH = 60  # characters of a text that a repr shows


class Marks:
    """Splits an answer that arrives in parts into runs of drafted and of other characters."""

    def __init__(self, tokenizer: Tokenizer):
        self._decoder = StreamDecoder(tokenizer)
        self._drafted: list[bool] = []  # of each character that was decoded and not yet taken

    def runs(
        self, text: str, tokens: Iterable[Any], drafted: Iterable[Any]
    ) -> list[tuple[str, bool]]:
        """The next `text` of the answer in runs.

        A character whose bytes come from several tokens counts as drafted if the last one was.

        Args:
            text: what to print now; it may hold back what earlier or these tokens spell, as the
                text does where a stop string may begin.
            tokens: ids that are new since the last call.
            drafted: of each of them, whether the draft proposed it.

        Returns:
            Pieces of `text` in order, each with whether it was drafted.
        """
        for token, flag in zip(tokens, drafted, strict=True):
            self._drafted += [bool(flag)] * len(self._decoder.feed([int(token)]))
        flags = self._drafted[: len(text)]
        del self._drafted[: len(text)]
        flags += [False] * (len(text) - len(flags))  # an answer may end inside a character
        groups = itertools.groupby(zip(text, flags, strict=True), key=lambda pair: pair[1])
        return [("".join(letter for letter, _ in group), flag) for flag, group in groups]


def ansi(runs: Iterable[tuple[str, bool]]) -> str:
    """Runs for a terminal: drafted characters on a light background, which never spans lines."""
    # A background up to a line's end would fill the terminal's row, so line ends stay outside.
    return "".join(
        f"{_ON}{part}{_OFF}" if drafted and part not in ("\n", "") else part
        for text, drafted in runs
        for part in re.split("(\n)", text)
    )


def markup(
    tokenizer: Tokenizer, text: str, tokens: Iterable[Any], drafted: Iterable[Any], caption: str
) -> str:
    """HTML of an answer for a notebook, drafted characters on a background, all text escaped.

    Args:
        tokenizer: of the model.
        text: the answer.
        tokens: [n] its ids.
        drafted: [n] whether the draft proposed each of them.
        caption: a line below it.
    """
    parts = [
        f'<span style="{_STYLE}">{html.escape(run)}</span>' if flag else html.escape(run)
        for run, flag in Marks(tokenizer).runs(text, tokens, drafted)
    ]
    return (
        f'<div style="white-space:pre-wrap">{"".join(parts)}</div>'
        f'<div style="font-size:85%;opacity:.7">{html.escape(caption)}</div>'
    )


def caption(statistics: Any) -> str:
    """A line on a generation: acceptance length τ, tokens per second, what decoded, where."""
    return (
        f"τ = {statistics.tau:.2f} tokens a pass, {statistics.tokens_per_second:.1f} tokens/s, "
        f"{statistics.method}, {statistics.device}"
    )


def short_statistics(statistics: Any) -> str:
    """A repr of `Statistics` whose length does not grow with the batch."""
    new, rounds = sum(statistics.new_tokens), sum(statistics.rounds)
    rows = len(statistics.new_tokens)
    batch = f", {rows} rows" if rows != 1 else ""
    return (
        f"Statistics({new} tokens in {rounds} rounds{batch}, tau {statistics.tau:.2f}, "
        f"{statistics.tokens_per_second:.1f} tokens/s, {statistics.method}, {statistics.device})"
    )


def short_generation(text: Any, tokens: Any, statistics: Any) -> str:
    """A repr of `Generation`: the beginning of the text, or the number of answers of a batch."""
    if len(statistics.new_tokens) != 1 or isinstance(tokens, list):
        first = f", first {_short(text[0])}" if text else ""
        head = f"{len(tokens)} answers{first}"
    else:
        head = f"{len(tokens)} tokens" if text is None else _short(text)
    return (
        f"Generation({head}, tau {statistics.tau:.2f}, {statistics.tokens_per_second:.1f} tokens/s)"
    )


def _short(text: str) -> str:
    return repr(text if len(text) <= _WIDTH else text[: _WIDTH - 1] + "…")
