"""Display of answers: drafted characters in colour, and short texts for a REPL.

Drafted characters come from tokens that the draft proposed and the target accepted. The others come
from bonus tokens, which the target adds, one per round.
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
_WIDTH = 60  # longest text that a repr shows in full, in characters


class Marks:
    """Splits an answer that arrives in parts into runs of drafted and of other characters."""

    def __init__(self, tokenizer: Tokenizer):
        self._decoder = StreamDecoder(tokenizer)
        self._drafted: list[bool] = []  # one flag per character that `runs` has not returned yet

    def runs(
        self, text: str, tokens: Iterable[Any], drafted: Iterable[Any]
    ) -> list[tuple[str, bool]]:
        """Splits the next `text` of the answer into runs.

        A character whose bytes come from several tokens counts as drafted if the last one was.

        Args:
            text: the text to print now. It may lag behind the tokens, because text that may be the
                beginning of a stop string is held back.
            tokens: ids that are new since the last call.
            drafted: whether each of them was an accepted draft.

        Returns:
            Parts of `text` in order, each with whether it was drafted.
        """
        for token, flag in zip(tokens, drafted, strict=True):
            self._drafted += [bool(flag)] * len(self._decoder.feed([int(token)]))
        flags = self._drafted[: len(text)]
        del self._drafted[: len(text)]
        flags += [False] * (len(text) - len(flags))  # an answer may end inside a character
        groups = itertools.groupby(zip(text, flags, strict=True), key=lambda pair: pair[1])
        return [("".join(letter for letter, _ in group), flag) for flag, group in groups]


def ansi(runs: Iterable[tuple[str, bool]]) -> str:
    """Returns runs as text for a terminal, with drafted characters on a light background."""
    # A background that includes a line end would fill the terminal's row, so line ends have none.
    return "".join(
        f"{_ON}{part}{_OFF}" if drafted and part not in ("\n", "") else part
        for text, drafted in runs
        for part in re.split("(\n)", text)
    )


def markup(
    tokenizer: Tokenizer, text: str, tokens: Iterable[Any], drafted: Iterable[Any], caption: str
) -> str:
    """Returns the HTML of an answer with drafted characters highlighted and all text escaped.

    Args:
        tokenizer: the model's tokenizer.
        text: the answer.
        tokens: [n] its ids.
        drafted: [n] whether each of them was an accepted draft.
        caption: a line to show below the answer.
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
    """Returns a line with the acceptance length τ, tokens per second, method and device."""
    return (
        f"τ = {statistics.tau:.2f} tokens a pass, {statistics.tokens_per_second:.1f} tokens/s, "
        f"{statistics.method}, {statistics.device}"
    )


def short_statistics(statistics: Any) -> str:
    """Returns a repr of `Statistics` whose length does not grow with the batch."""
    new, rounds = sum(statistics.new_tokens), sum(statistics.rounds)
    rows = len(statistics.new_tokens)
    batch = f", {rows} rows" if rows != 1 else ""
    return (
        f"Statistics({new} tokens in {rounds} rounds{batch}, tau {statistics.tau:.2f}, "
        f"{statistics.tokens_per_second:.1f} tokens/s, {statistics.method}, {statistics.device})"
    )


def short_generation(text: Any, tokens: Any, statistics: Any) -> str:
    """Returns a repr of `Generation` with the start of the text, or a batch's number of answers."""
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
