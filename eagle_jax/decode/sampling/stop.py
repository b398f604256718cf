"""`Answer`: decodes the text of one answer incrementally, up to the first stop string."""

from __future__ import annotations

from collections.abc import Sequence

from eagle_jax.text import StreamDecoder, Tokenizer


class Answer:
    """Decodes an answer token by token and ends it at a stop string.

    The answer ends with the first token whose text completes a stop string; the split of the tokens
    into chunks has no influence. Text that may be the beginning of a stop string is held back.

    Attributes:
        tokens: number of tokens, including the one that completed a stop string.
        stopped: whether a stop string has ended the answer.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, stop: Sequence[str] = (), min_tokens: int = 0
    ) -> None:
        """Creates an empty answer.

        Args:
            tokenizer: the model's; if None, the answer has no text and `stop` must be empty.
            stop: stop strings.
            min_tokens: stop strings that end before this many tokens are ignored.
        """
        assert tokenizer is not None or not stop
        self._decoder = None if tokenizer is None else StreamDecoder(tokenizer)
        self._stop, self._min_tokens = tuple(stop), min_tokens
        self._longest = max(map(len, self._stop), default=0)
        self._held = ""  # decoded text that `feed` has not returned yet
        self.tokens, self.stopped = 0, False

    def feed(self, tokens: Sequence[int], last: bool = False) -> str | None:
        """Add tokens and return the text that can be handed out, or None without a tokenizer.

        Args:
            tokens: new tokens; those after a stop string are ignored.
            last: whether the answer ends here, so that no text is held back any more.
        """
        if self._decoder is None:
            self.tokens += len(tokens)
            return None
        if not self._stop:
            self.tokens += len(tokens)
            return self._decoder.feed(tokens) + (self._decoder.flush() if last else "")
        for token in tokens:
            if self.stopped:
                break
            self.tokens += 1
            self._add(self._decoder.feed([token]))
        if last and not self.stopped:
            self._add(self._decoder.flush())
        certain = len(self._held) - (0 if last or self.stopped else self._possible())
        text, self._held = self._held[:certain], self._held[certain:]
        return text

    def _add(self, new: str) -> None:
        """Append text; if it completes a stop string, cut the text there."""
        old, self._held = len(self._held), self._held + new
        if not new or self.tokens < self._min_tokens:
            return
        places = (self._held.find(stop, max(0, old - len(stop) + 1)) for stop in self._stop)
        found = [place for place in places if place >= 0]
        if found:
            self._held, self.stopped = self._held[: min(found)], True

    def _possible(self) -> int:
        """Returns the length of the longest suffix that may be the beginning of a stop string."""
        for size in range(min(self._longest - 1, len(self._held)), 0, -1):
            tail = self._held[-size:]
            if any(len(stop) > size and stop.startswith(tail) for stop in self._stop):
                return size
        return 0
