"""`Vocabulary`: a model's token ids, against which sampling settings are checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from eagle_jax.decode.sampling.params import SamplingParams
from eagle_jax.params import Params


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A model's token ids.

    Attributes:
        size: v, number of ids.
        eos: ids that end an answer.
        encode: returns the token ids of a text; None if the model has no tokenizer.
    """

    size: int
    eos: tuple[int, ...] = ()
    encode: Callable[[str], list[int]] | None = None

    @classmethod
    def of(cls, params: Params) -> Vocabulary:
        """Returns the vocabulary of a model."""
        size, tokenizer = params.target_config.vocab_size, params.tokenizer
        if tokenizer is None:
            return cls(size)
        return cls(size, tokenizer.eos_ids, tokenizer.encode)

    def ends(self, params: SamplingParams) -> tuple[int, ...]:
        """Returns the tokens that end an answer with these settings."""
        return (*(() if params.ignore_eos else self.eos), *params.stop_token_ids)

    def resolve(self, params: SamplingParams) -> SamplingParams:
        """Returns `params` checked for this model, with bad words as token ids.

        Raises:
            ValueError: a token id outside the vocabulary, text without a tokenizer, or settings
                that leave no token to draw; one line.
        """
        words: dict[tuple[int, ...], None] = {}
        for word in params.bad_words:
            words.update(dict.fromkeys(self._spellings(word)))
        named = {
            "logit_bias": dict(params.logit_bias),
            "allowed_token_ids": params.allowed_token_ids or (),
            "stop_token_ids": params.stop_token_ids,
            "bad_words": [token for word in words for token in word],
        }
        for name, ids in named.items():
            for token in ids:
                if token >= self.size:
                    raise ValueError(
                        f"{name}: token id {token} is outside the vocabulary 0..{self.size - 1}"
                    )
        if params.stop and self.encode is None:
            raise ValueError(
                f"stop={params.stop[0]!r}: text needs a tokenizer, and params has none; use "
                "stop_token_ids"
            )
        if params.allowed_token_ids is not None:
            left = set(params.allowed_token_ids) - {word[0] for word in words if len(word) == 1}
            if not left or (params.min_tokens and left <= set(self.ends(params))):
                raise ValueError(
                    "allowed_token_ids: bad_words or min_tokens exclude all of them; allow another"
                )
        return dataclasses.replace(params, bad_words=tuple(words))

    def _spellings(self, word: str | Sequence[int]) -> list[tuple[int, ...]]:
        """Returns the token ids of a bad word at the start of a text and after a blank."""
        if not isinstance(word, str):
            return [tuple(word)]
        if self.encode is None:
            raise ValueError(
                f"bad_words={word!r}: text needs a tokenizer, and params has none; give token ids"
            )
        return [tuple(self.encode(text)) for text in (word, f" {word}")]
