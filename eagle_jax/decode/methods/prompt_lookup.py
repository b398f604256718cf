"""Prompt lookup (Saxena, 2023): what followed the same words before is the draft.

The last few committed tokens are looked up in the committed text itself, prompt included, and the
tokens after the match are drafted as a chain. No model drafts, so a round costs one target pass.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from eagle_jax.checks import check_flag, check_whole
from eagle_jax.decode.acceptance import Exact
from eagle_jax.decode.method import Context, Models, Prompt, Rule, Verified
from eagle_jax.decode.tree import Proposal, chain
from eagle_jax.params import Params


def suffix_match(
    tokens: Int[Array, " c"],
    length: Int[Array, ""],
    max_ngram: int,
    min_ngram: int = 1,
    needed: int = 1,
    latest: bool = False,
) -> tuple[Int[Array, ""], Int[Array, ""], Int[Array, ""]]:
    """Where else the text holds its own last tokens: one row, `max_ngram` passes over it.

    The longest suffix of at most `max_ngram` tokens wins that occurs earlier with a long enough
    continuation; occurrence and suffix may overlap.

        a b c d a b c | ?      the suffix `a b c` stands at 0: start 3, matched 3, available 4
              ^ start

    Args:
        tokens: committed tokens; entries from `length` on are not read.
        length: how many are committed, at least 1.
        max_ngram, min_ngram: longest and shortest suffix looked for, in tokens.
        needed: matches with fewer tokens after them are passed over.
        latest: of several matches take the last one, not the first.

    Returns:
        Start of the continuation, length of the matched suffix, and how many tokens there are from
        the start to the end of the text. Without a match: `length - 1`, 0 and 0.
    """
    place = jnp.arange(tokens.shape[0], dtype=jnp.int32)  # of a match's last token
    equal = length - 1 - place >= max(needed, 1)
    matched = jnp.zeros_like(place)
    for back in range(max_ngram):
        own = jnp.take(tokens, length - 1 - back, mode="clip")
        # Rolling wraps around, and a suffix longer than the text does not exist: `place >= back`
        # excludes both, as a match ends before the suffix does.
        equal &= (jnp.roll(tokens, back) == own) & (place >= back)
        matched += equal.astype(jnp.int32)
    best = jnp.max(matched)
    found = (best >= min_ngram) & (best > 0)
    hits = matched == best
    last = jnp.max(jnp.where(hits, place, -1)) if latest else jnp.argmax(hits).astype(jnp.int32)
    start = jnp.where(found, last + 1, length - 1)
    return start, jnp.where(found, best, 0), jnp.where(found, length - start, 0)


def lookup(
    tokens: Int[Array, "b c"],
    length: Int[Array, " b"],
    count: int,
    max_ngram: int,
    min_ngram: int = 1,
    latest: bool = False,
    truncate: bool = False,
) -> tuple[Int[Array, "b k"], Int[Array, " b"]]:
    """The `count` tokens that followed the longest match, and the match's length, of every row.

    A truncated continuation goes on as if the text from the match on repeated itself, which is
    right for loops. Rows without a match (length 0) get their last token over and over.

    Args:
        tokens: committed tokens; entries from `length` on are not read.
        length: how many are committed, at least 1.
        count: k, tokens to draft.
        max_ngram, min_ngram, latest: as in `suffix_match`.
        truncate: accept continuations shorter than `count`.
    """

    def one_row(tokens: Int[Array, " c"], length: Int[Array, ""]):
        start, matched, available = suffix_match(
            tokens, length, max_ngram, min_ngram, 1 if truncate else count, latest
        )
        step = jnp.arange(count, dtype=jnp.int32) % jnp.maximum(available, 1)
        return jnp.take(tokens, start + step, mode="clip"), matched

    return jax.vmap(one_row)(tokens, length)


@dataclasses.dataclass(frozen=True)
class PromptLookup:
    """Prompt lookup decoding with a chain of `length` drafted tokens.

    The defaults are the published variant. Others differ in which match they take and in what they
    do near the end of the text, which changes the acceptance: name the variant with any figure.

    Attributes:
        max_ngram, min_ngram: longest and shortest suffix looked for, in tokens.
        length: drafted tokens.
        latest: of several matches take the last one, not the first.
        truncate: accept matches with fewer than `length` tokens after them; else they are passed
            over.
    """

    max_ngram: int = 3
    min_ngram: int = 1
    length: int = 10
    latest: bool = False
    truncate: bool = False
    draft: None = dataclasses.field(default=None, init=False)
    rule: Rule = dataclasses.field(default=Exact(), init=False)

    def __post_init__(self) -> None:
        for name in ("max_ngram", "min_ngram", "length"):
            check_whole(name, getattr(self, name))
        for name in ("latest", "truncate"):
            check_flag(name, getattr(self, name))
        if self.min_ngram > self.max_ngram:
            raise ValueError(
                f"min_ngram={self.min_ngram}: must be at most max_ngram, {self.max_ngram}"
            )

    @property
    def nodes(self) -> int:
        return self.length + 1

    @property
    def depth(self) -> int:
        return self.length

    def check(self, params: Params) -> None:
        del params

    def init(self, models: Models, prompt: Prompt, slots: int) -> tuple[()]:
        del models, prompt, slots
        return ()

    def propose(
        self, models: Models, context: Context, state: tuple[()]
    ) -> tuple[Proposal, tuple[()]]:
        del models
        drafted, _ = lookup(
            context.tokens,
            context.length,
            self.length,
            self.max_ngram,
            self.min_ngram,
            self.latest,
            self.truncate,
        )
        tokens = jnp.concatenate([context.root()[:, None], drafted], axis=1)
        return Proposal(tokens, chain(self.length).shape(tokens.shape[0])), state

    def update(self, models: Models, state: tuple[()], verified: Verified) -> tuple[()]:
        del models, verified
        return state
