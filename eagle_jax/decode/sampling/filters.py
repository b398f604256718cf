"""Filters of the target's logits, one class each; `FILTERS` lists them in order of application.

A filter holds arrays with one entry per row, so that rows with different settings share one
compiled program. To add one, add a field to `SamplingParams` and to `Settings`, a class here, and
an entry in `FILTERS`.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from eagle_jax.decode.sampling.params import SamplingParams
from eagle_jax.decode.sampling.path import Path, put
from eagle_jax.decode.sampling.vocabulary import Vocabulary
from eagle_jax.types import Logits

T = TypeVar("T")
_WORD = 32  # bits per word of a mask
_ANY = -2  # wildcard in a pattern of tokens; every token matches it


class Capacities:
    """Sizes of padded arrays: powers of two that never shrink.

    A batcher uses one instance for its whole life, so that few sizes are compiled.
    """

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}

    def fit(self, name: str, needed: int, least: int) -> int:
        """Returns a size for array `name`: at least `needed`, `least` and its last size."""
        size = max(needed, least, self._sizes.get(name, 1))
        self._sizes[name] = 1 << (size - 1).bit_length()
        return self._sizes[name]

    def padded(self, name: str, rows: Sequence[Sequence[Any]], pad: Any, least: int) -> np.ndarray:
        """Returns lists of different lengths as one array, padded with `pad`."""
        size = self.fit(name, max(map(len, rows), default=0), least)
        return np.array([[*row, *[pad] * (size - len(row))] for row in rows])


@dataclasses.dataclass(frozen=True)
class Filter(abc.ABC):
    """Base class of all filters.

    Attributes:
        used: [b] whether each row uses this filter.
        truncates: class attribute; True for a filter that truncates the distribution after the
            temperature. It depends on the logits alone and also applies to the draft's logits.
    """

    used: Bool[Array, " b"]

    truncates: ClassVar[bool] = False

    @classmethod
    def of(
        cls, rows: Sequence[SamplingParams], vocabulary: Vocabulary, capacities: Capacities
    ) -> Filter:
        """Returns the filter with its arrays for these rows."""
        used: Any = np.array([cls.uses(row) for row in rows])
        return cls(used, **cls.arrays(rows, vocabulary, capacities))

    def __call__(self, logits: Float[Array, "b *t v"], path: Path | None) -> Float[Array, "b *t v"]:
        """Returns the logits, filtered in the rows that use this filter.

        The filter is skipped at run time if no row uses it.
        """

        def filtered(logits: Float[Array, "b *t v"]) -> Float[Array, "b *t v"]:
            out = self.apply(logits, path)
            return jnp.where(per_row(self.used, logits), out, logits)

        return jax.lax.cond(jnp.any(self.used), filtered, lambda logits: logits, logits)

    @staticmethod
    @abc.abstractmethod
    def uses(row: SamplingParams) -> bool:
        """Returns whether these settings need the filter."""

    @classmethod
    def arrays(
        cls, rows: Sequence[SamplingParams], vocabulary: Vocabulary, capacities: Capacities
    ) -> dict[str, np.ndarray]:
        """Returns the arrays of the filter's own fields.

        By default each holds, per row, the number in the field of `SamplingParams` with its name.
        """
        del vocabulary, capacities
        names = [field.name for field in dataclasses.fields(cls) if field.name != "used"]
        return {name: np.array([getattr(r, name) for r in rows], np.float32) for name in names}

    @abc.abstractmethod
    def apply(self, logits: Any, path: Any) -> Any:
        """Returns the filtered logits of all rows; `path` is None if `truncates`."""


def _filter(cls: type[T]) -> type[T]:
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


def per_row(values: Any, like: Array) -> Array:
    """Returns `values` [b] with as many axes as `like`, so that the two broadcast."""
    return jnp.reshape(jnp.asarray(values), (-1, *[1] * (like.ndim - 1)))


@_filter
class LogitBias(Filter):
    """Adds a bias to the logits of given tokens."""

    ids: Int[Array, "b m"]
    bias: Float[Array, "b m"]

    @staticmethod
    def uses(row: SamplingParams) -> bool:
        return bool(row.logit_bias)

    @classmethod
    def arrays(cls, rows, vocabulary, capacities):
        pairs = [list(dict(row.logit_bias).items()) for row in rows]
        pairs = capacities.padded("logit_bias", pairs, (vocabulary.size, 0.0), 16)
        return {"ids": pairs[..., 0].astype(np.int32), "bias": pairs[..., 1].astype(np.float32)}

    def apply(self, logits: Logits, path: Path) -> Logits:
        del path

        def of_row(ids: Int[Array, " m"], bias: Float[Array, " m"]) -> Float[Array, " v"]:
            return jnp.zeros(logits.shape[-1], logits.dtype).at[ids].add(bias, mode="drop")

        return logits + jax.vmap(of_row)(self.ids, self.bias.astype(logits.dtype))[:, None]


@_filter
class AllowedTokenIds(Filter):
    """Excludes every token that is not allowed; each word of the mask holds 32 tokens."""

    mask: UInt32[Array, "b w"]

    @staticmethod
    def uses(row: SamplingParams) -> bool:
        return row.allowed_token_ids is not None

    @classmethod
    def arrays(cls, rows, vocabulary, capacities):
        del capacities
        bits = np.ones((len(rows), -(-vocabulary.size // _WORD) * _WORD), bool)
        for row, allowed in zip(bits, (row.allowed_token_ids for row in rows), strict=True):
            if allowed is not None:
                row[:] = False
                row[list(allowed)] = True
        words = np.packbits(bits.reshape(len(rows), -1, _WORD), axis=-1, bitorder="little")
        return {"mask": words.view("<u4")[..., 0].astype(np.uint32)}

    def apply(self, logits: Logits, path: Path) -> Logits:
        del path
        bit = jnp.arange(_WORD, dtype=jnp.uint32)[None, None]
        allowed = ((self.mask[:, :, None] >> bit) & jnp.uint32(1)).astype(bool)
        allowed = allowed.reshape(len(self.mask), -1)[:, None, : logits.shape[-1]]
        return jnp.where(allowed, logits, -jnp.inf)


@_filter
class BadWords(Filter):
    """Excludes the last token of a bad word wherever the text ends with the word's other tokens.

    It gives the same result as transformers' `NoBadWordsLogitsProcessor`.
    """

    before: Int[Array, "b w m"]
    last: Int[Array, "b w"]

    @staticmethod
    def uses(row: SamplingParams) -> bool:
        return bool(row.bad_words)

    @classmethod
    def arrays(cls, rows, vocabulary, capacities):
        words = [list(row.bad_words) for row in rows]
        longest = max((len(word) for row in words for word in row), default=1)
        count = capacities.fit("bad_words", max(map(len, words)), 8)
        before = np.full((len(rows), count, capacities.fit("bad_words_length", longest, 4)), _ANY)
        last = np.full((len(rows), count), vocabulary.size)
        for i, row in enumerate(words):
            for j, word in enumerate(row):
                *first, last[i, j] = word
                before[i, j, : len(first)] = first[::-1]  # newest first, like `Path.recent`
        return {"before": before.astype(np.int32), "last": last.astype(np.int32)}

    def apply(self, logits: Logits, path: Path) -> Logits:
        recent = path.recent(self.before.shape[-1])[:, :, None]
        before = self.before[:, None]
        matches = jnp.all((before == recent) | (before == _ANY), axis=-1)  # [b, t, w]
        ids = jnp.where(matches, self.last[:, None], logits.shape[-1])
        return put(logits, ids, jnp.full(ids.shape, -jnp.inf, logits.dtype))


@_filter
class MinTokens(Filter):
    """Excludes end tokens while an answer is shorter than its minimum."""

    min_tokens: Int[Array, " b"]
    ends: Int[Array, "b m"]

    @staticmethod
    def uses(row: SamplingParams) -> bool:
        return row.min_tokens > 0

    @classmethod
    def arrays(cls, rows, vocabulary, capacities):
        ends = [vocabulary.ends(row) for row in rows]
        return {
            "min_tokens": np.array([row.min_tokens for row in rows], np.int32),
            "ends": capacities.padded("ends", ends, vocabulary.size, 8).astype(np.int32),
        }

    def apply(self, logits: Logits, path: Path) -> Logits:
        short = path.answered() < self.min_tokens[:, None]
        ids = jnp.where(short[:, :, None], self.ends[:, None], logits.shape[-1])
        return put(logits, ids, jnp.full(ids.shape, -jnp.inf, logits.dtype))


@_filter
class RepetitionPenalty(Filter):
    """Lowers the logits of tokens that occur in the prompt or the answer.

    It divides positive logits and multiplies negative ones: the penalty of CTRL (arXiv 1909.05858,
    section 4.1) as transformers implements it.
    """

    repetition_penalty: Float[Array, " b"]

    @staticmethod
    def uses(row: SamplingParams) -> bool:
        return row.repetition_penalty != 1

    def apply(self, logits: Logits, path: Path) -> Logits:
        factor = per_row(self.repetition_penalty, logits)

        def penalised(logits, in_prompt, count):
            new = jnp.where(logits < 0, logits * factor, logits / factor)
            return jnp.where(in_prompt | (count > 0), new, logits)

        return path.penalise(logits, penalised)


@_filter
class PresencePenalty(Filter):
    """Subtracts a number from the logit of every token that occurs in the answer."""

    presence_penalty: Float[Array, " b"]

    @staticmethod
    def uses(row: SamplingParams) -> bool:
        return row.presence_penalty != 0

    def apply(self, logits: Logits, path: Path) -> Logits:
        penalty = per_row(self.presence_penalty, logits)
        return path.penalise(logits, lambda x, _, count: jnp.where(count > 0, x - penalty, x))


@_filter
class FrequencyPenalty(Filter):
    """Subtracts a number from a token's logit once per occurrence in the answer."""

    frequency_penalty: Float[Array, " b"]

    @staticmethod
    def uses(row: SamplingParams) -> bool:
        return row.frequency_penalty != 0

    def apply(self, logits: Logits, path: Path) -> Logits:
        penalty = per_row(self.frequency_penalty, logits)
        return path.penalise(logits, lambda x, _, count: x - penalty * count.astype(x.dtype))


@_filter
class TopK(Filter):
    """Keeps the k likeliest tokens, and those that tie with the last of them."""

    top_k: Int[Array, " b"]

    truncates: ClassVar[bool] = True

    @staticmethod
    def uses(row: SamplingParams) -> bool:
        return row.top_k > 0 and row.temperature > 0

    @classmethod
    def arrays(cls, rows, vocabulary, capacities):
        del vocabulary, capacities
        return {"top_k": np.array([row.top_k for row in rows], np.int32)}

    def apply(self, logits: Float[Array, "b *t v"], path: None) -> Float[Array, "b *t v"]:
        del path
        wanted = jnp.clip(per_row(self.top_k, logits[..., 0]), 1, logits.shape[-1])
        return _keep(logits, logits, lambda kept: jnp.sum(kept, axis=-1) >= wanted)


@_filter
class TopP(Filter):
    """Keeps the smallest set of likeliest tokens with at least this much probability."""

    top_p: Float[Array, " b"]

    truncates: ClassVar[bool] = True

    @staticmethod
    def uses(row: SamplingParams) -> bool:
        return row.top_p < 1 and row.temperature > 0

    def apply(self, logits: Float[Array, "b *t v"], path: None) -> Float[Array, "b *t v"]:
        del path
        probs = jax.nn.softmax(logits, axis=-1)
        # Rounding may leave the total below a top-p near 1; keeping all tokens is then enough.
        wanted = jnp.minimum(per_row(self.top_p, logits[..., 0]), jnp.sum(probs, axis=-1))
        return _keep(
            logits, probs, lambda kept: jnp.sum(jnp.where(kept, probs, 0), axis=-1) >= wanted
        )


@_filter
class MinP(Filter):
    """Keeps tokens with at least this share of the likeliest token's probability."""

    log_min_p: Float[Array, " b"]

    truncates: ClassVar[bool] = True

    @staticmethod
    def uses(row: SamplingParams) -> bool:
        return row.min_p > 0 and row.temperature > 0

    @classmethod
    def arrays(cls, rows, vocabulary, capacities):
        del vocabulary, capacities
        logs = [math.log(row.min_p) if row.min_p else -math.inf for row in rows]
        return {"log_min_p": np.array(logs, np.float32)}

    def apply(self, logits: Float[Array, "b *t v"], path: None) -> Float[Array, "b *t v"]:
        del path
        best = jnp.max(logits, axis=-1, keepdims=True)
        return jnp.where(logits < best + per_row(self.log_min_p, logits), -jnp.inf, logits)


FILTERS: tuple[type[Filter], ...] = (
    LogitBias,
    AllowedTokenIds,
    BadWords,
    MinTokens,
    RepetitionPenalty,
    PresencePenalty,
    FrequencyPenalty,
    TopK,
    TopP,
    MinP,
)


def _keep(
    scaled: Float[Array, "*lead v"],
    values: Float[Array, "*lead v"],
    enough: Callable[[Bool[Array, "*lead v"]], Bool[Array, "*lead"]],
) -> Float[Array, "*lead v"]:
    """Returns `scaled` for the fewest largest `values` that are `enough`, and -inf elsewhere.

    Tokens that tie with the last one kept are kept too, so that the result does not depend on a
    sort's order of ties. The threshold is found by bisection over the bits of a float, in 32 passes
    over the vocabulary; sorting every node's logits costs several times as much.
    """
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    order = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # integers in the order of the floats

    def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # `low` keeps enough, `high` keeps too few
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, computed without overflow
        good = enough(order >= middle[..., None])
        return jnp.where(good, middle, low), jnp.where(good, high, middle)

    low = jnp.full(values.shape[:-1], jnp.iinfo(jnp.int32).min)
    high = jnp.full(values.shape[:-1], jnp.iinfo(jnp.int32).max)
    threshold, _ = jax.lax.fori_loop(0, 32, halve, (low, high))
    return jnp.where(order >= threshold[..., None], scaled, -jnp.inf)
