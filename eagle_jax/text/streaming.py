"""Decodes token ids that arrive in chunks."""

from __future__ import annotations

from collections.abc import Iterable

from eagle_jax.text.tokenizer import Tokenizer

_INCOMPLETE = "\ufffd"


class StreamDecoder:
    """Turns ids that arrive in chunks into text that can be printed at once.

    A character whose bytes are incomplete is held back until the rest arrives.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        # Printed ids before the pending ones, since some tokenizers drop the first token's space.
        self._context: list[int] = []
        self._pending: list[int] = []
        self._printed = 0

    def feed(self, ids: Iterable[int]) -> str:
        """Adds ids and returns the text that is now final, which is often empty."""
        self._pending += ids
        text = self._text()
        certain = text.rstrip(_INCOMPLETE)
        new = certain[self._printed :]
        self._printed = len(certain)
        if certain == text:
            self._context = self._pending if text else self._context
            self._pending, self._printed = [], 0
        return new

    def flush(self) -> str:
        """Ends the stream and returns the text held back, with U+FFFD for incomplete bytes."""
        new = self._text()[self._printed :]
        self._context, self._pending, self._printed = [], [], 0
        return new

    def _text(self) -> str:
        before = self._tokenizer.decode(self._context, self._skip_special)
        both = self._tokenizer.decode(self._context + self._pending, self._skip_special)
        return both[len(before) :]
