"""Prompt lookup (Saxena, 2023): drafts the tokens that followed the same words before.

The method searches the committed text, prompt included, for an earlier occurrence of its last few
tokens, and drafts the tokens after the match as a chain. There is no draft model, so a round costs
one target pass.
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
    """Finds an earlier occurrence of the last tokens of one row's text.

    It takes the longest suffix of at most `max_ngram` tokens that occurs earlier with a long enough
    continuation. The occurrence and the suffix may overlap.

        a b c d a b c | ?      the suffix `a b c` occurs at 0: start 3, matched 3, available 4
              ^ start

    Args:
        tokens: committed tokens; entries from `length` on are not read.
        length: number of committed tokens, at least 1.
        max_ngram, min_ngram: longest and shortest suffix to search for, in tokens.
        needed: matches followed by fewer tokens are ignored.
        latest: whether to take the last of several matches instead of the first.

    Returns:
        The start of the continuation, the length of the matched suffix, and the number of tokens
        from that start to the end of the text. Without a match: `length - 1`, 0 and 0.
    """
    place = jnp.arange(tokens.shape[0], dtype=jnp.int32)  # position of a match's last token
    equal = length - 1 - place >= max(needed, 1)
    matched = jnp.zeros_like(place)
    for back in range(max_ngram):
        own = jnp.take(tokens, length - 1 - back, mode="clip")
        # `place >= back` excludes what `roll` wraps around and suffixes longer than the text, as a
        # match ends before the suffix does.
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
    """Returns the `count` tokens after the longest match, and its length, for every row.

    A continuation that ends too early is repeated from its start, which is right for text in a
    loop. Rows without a match (length 0) get their last token repeated.

    Args:
        tokens: committed tokens; entries from `length` on are not read.
        length: number of committed tokens, at least 1.
        count: k, tokens to draft.
        max_ngram, min_ngram, latest: as in `suffix_match`.
        truncate: whether to accept continuations shorter than `count`.
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

    The defaults are the published variant. Other variants choose another match or treat matches
    near the end of the text differently, which changes τ; name the variant when you report a
    figure.

    Attributes:
        max_ngram, min_ngram: longest and shortest suffix to search for, in tokens.
        length: number of drafted tokens.
        latest: whether to take the last of several matches instead of the first.
        truncate: whether to accept matches with fewer than `length` tokens after them; otherwise
            they are ignored.
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
