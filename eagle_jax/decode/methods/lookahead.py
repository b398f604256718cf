"""Lookahead decoding (arXiv 2402.02057): n-grams from Jacobi iteration, no draft model.

Every pass scores two things beside the root: a window of guessed future tokens, whose columns
yield `window` new n-grams a round, and `guesses` n-grams of the pool that begin with the root's
token. All of it is one tree, so the engine's acceptance serves as it is.

The window has N-1 rows of W slots, row-major; slot (0, 0) is the root. Example with N = 4, W = 3,
G = 1, slots numbered, edges pointing from parent to child:

    row 0    0 -> 1 -> 2      the trajectory: slot (0, c) follows (0, c-1)
    row 1    3    4    5      (r, c) follows (r-1, c)
    row 2    6    7    8
    guess    0 -> 9 -> 10 -> 11

A slot's depth is r + c and its ancestors are row 0 up to column c and column c up to row r: just
what the paper's mask lets it see. Accepting a path through the window, when the
trajectory happens to be the target's own text, is therefore as lossless as accepting a guess. The
paper's verification branch doesn't do this (it is rare outside loops), and its code drops the bonus
token after a fully accepted guess; both come for free here and only lengthen what is accepted.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from eagle_jax.checks import check_flag, check_whole
from eagle_jax.decode.acceptance import Exact
from eagle_jax.decode.method import Context, Models, Prompt, Rule, Verified
from eagle_jax.decode.top_k import argmax
from eagle_jax.decode.tree import Proposal, Shape
from eagle_jax.params import Params

_CHUNK = 64  # prompt n-grams inserted at once: work grows with its square, steps with its inverse


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pool:
    """N-grams by first token: for each, the last G distinct ones met, oldest first.

    Attributes:
        grams: [*b, v, G, N-1] the tokens that followed; zeros from `count` on.
        count: [*b, v] n-grams of each token.
    """

    grams: Int[Array, "*b v G m"]
    count: Int[Array, "*b v"]


def insert(
    pool: Pool, keys: Int[Array, " i"], grams: Int[Array, "i m"], valid: Bool[Array, " i"]
) -> Pool:
    """Add n-grams in order to one row's pool, all at once.

    A gram that is there already becomes the newest; where there is no room the oldest one goes. So
    a key keeps its last G distinct grams, each where it was met last, and neither the order of the
    writes nor a loop is needed: a gram's place follows from how many distinct ones come after it.

    Args:
        pool: of one row.
        keys, grams: first tokens, and the N-1 tokens after each.
        valid: which of them to add.
    """
    vocab, room, _ = pool.grams.shape
    order = jnp.arange(keys.shape[0])
    later = order[None, :] > order[:, None]
    same_key = (keys[:, None] == keys[None, :]) & valid[None, :]  # [i, j]: j is valid
    same = same_key & jnp.all(grams[:, None] == grams[None, :], axis=-1)
    kept = valid & ~jnp.any(same & later, axis=1)
    newer = jnp.sum(same_key & later & kept[None, :], axis=1)  # distinct grams after each

    # What there was under each key, and which of it isn't met again.
    old = pool.grams[keys]  # [i, G, m]
    again = jnp.all(old[:, None] == grams[None, :, None], axis=-1) & same_key[:, :, None]
    stays = (jnp.arange(room)[None] < pool.count[keys][:, None]) & ~jnp.any(again, axis=1)
    fresh = jnp.sum(same_key & kept[None, :], axis=1)
    left = jnp.cumsum(stays[:, ::-1], axis=1)[:, ::-1]  # that stay, from each on
    total = jnp.minimum(fresh + left[:, 0], room)

    # Each key's newest gram writes the old ones; no slot is written twice.
    newest = kept & (newer == 0)
    age = jnp.concatenate([fresh[:, None] + left - 1, newer[:, None]], axis=1)  # [i, G + 1]
    writes = jnp.concatenate([stays & newest[:, None], kept[:, None]], axis=1) & (age < room)
    place = jnp.where(writes, total[:, None] - 1 - age, room)
    written = jnp.concatenate([old, grams[:, None]], axis=1)
    return Pool(
        pool.grams.at[keys[:, None], place].set(written, mode="drop"),
        pool.count.at[jnp.where(newest, keys, vocab)].set(total, mode="drop"),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LookaheadState:
    """State between rounds.

    Attributes:
        window: [b, N-1, W] guessed tokens; slot (0, 0) is not read, the root takes its place.
        pool: of every row.
        seen: [b] committed tokens whose n-grams are in the pool (with `prompt_pool`).
    """

    window: Int[Array, "b r w"]
    pool: Pool
    seen: Int[Array, " b"]


@dataclasses.dataclass(frozen=True)
class Lookahead:
    """Lookahead decoding.

    A pass scores (N-1)(W+G) tokens: 56 by default, the authors' setting for 7B models; on an A100
    the paper uses N = 5 and W = G = 15. The pool takes 4 v G (N-1) bytes a row: 3.4 MiB for a
    vocabulary of 32000 and the defaults, 29 MiB for 128256 and G = 15.

    The paper fills the window row by row in N-2 passes before it verifies anything; here all of it
    starts with tokens of the prompt, which takes as many rounds to be forgotten.

    Attributes:
        ngram: N, length of an n-gram: up to N-1 guessed tokens and the bonus token a round. With 2
            the window is its first row alone, plain Jacobi iteration, and guesses have one token.
        window: W, columns of the window: n-grams found per round.
        guesses: G, n-grams verified per round, and kept per first token.
        prompt_pool: put the n-grams of the prompt and of the answer into the pool too, which
            includes what prompt lookup finds; the authors leave it off by default.
        coupled: the window goes on with the target's draw under the noise of each slot's position,
            so that at temperature > 0 the trajectory settles on the text that will be sampled, as
            long as rounds commit one token each; without it with the likeliest token, as the
            authors do.
    """

    ngram: int = 5
    window: int = 7
    guesses: int = 7
    prompt_pool: bool = True
    coupled: bool = True
    draft: None = dataclasses.field(default=None, init=False)
    rule: Rule = dataclasses.field(default=Exact(), init=False)

    def __post_init__(self) -> None:
        for name, least in (("ngram", 2), ("window", 1), ("guesses", 1)):
            check_whole(name, getattr(self, name), least)
        for name in ("prompt_pool", "coupled"):
            check_flag(name, getattr(self, name))

    @property
    def nodes(self) -> int:
        return (self.ngram - 1) * (self.window + self.guesses)

    @property
    def depth(self) -> int:
        """Of the deepest node, a guess's or the window's last: its draw needs noise as well."""
        return self.ngram - 1 + max(self.window - 2, 0)

    @functools.cached_property
    def parents(self) -> np.ndarray:
        """[t] parent of each node."""
        rows, w = self.ngram - 1, self.window
        slots = np.arange(rows * w)
        window = np.where(slots < w, np.maximum(slots - 1, 0), slots - w)
        guesses = np.arange(rows * w, self.nodes)
        guesses = np.where(guesses % rows == 0, 0, guesses - 1)
        return np.concatenate([window, guesses]).astype(np.int32)

    @functools.cached_property
    def ancestors(self) -> np.ndarray:
        """[t, t] which nodes each node sees."""
        out = np.eye(self.nodes, dtype=bool)
        for node in range(1, self.nodes):
            out[node] |= out[self.parents[node]]
        return out

    @functools.cached_property
    def depths(self) -> np.ndarray:
        """[t] depth of each node."""
        return (self.ancestors.sum(axis=1) - 1).astype(np.int32)

    def check(self, params: Params) -> None:
        del params

    def init(self, models: Models, prompt: Prompt, slots: int) -> LookaheadState:
        """Tokens of the prompt in the window, and its n-grams in the pool."""
        del slots
        b = prompt.tokens.shape[0]
        rows, vocab = self.ngram - 1, models.target.embed_tokens.embedding[...].shape[0]
        # Fibonacci hashing: scattered over the prompt, and the same in every run.
        scattered = np.arange(1, rows * self.window + 1, dtype=np.uint64) * 2654435769 % 2**32
        index = jnp.asarray(scattered >> 8, jnp.int32)[None] % prompt.length[:, None]
        window = jnp.take_along_axis(prompt.tokens, index, axis=1)
        pool = Pool(
            jnp.zeros((b, vocab, self.guesses, rows), jnp.int32), jnp.zeros((b, vocab), jnp.int32)
        )
        if self.prompt_pool:
            pool = jax.vmap(self._insert_prompt)(pool, prompt.tokens, prompt.length)
        return LookaheadState(window.reshape(b, rows, self.window), pool, prompt.length)

    def propose(
        self, models: Models, context: Context, state: LookaheadState
    ) -> tuple[Proposal, LookaheadState]:
        del models
        b, root = state.window.shape[0], context.root()
        if self.prompt_pool:
            pool = jax.vmap(self._insert_text, in_axes=(0, 0, 0, 0, None))(
                state.pool, context.tokens, state.seen, context.length, self.depth + 1
            )
            state = dataclasses.replace(state, pool=pool, seen=context.length)
        window = state.window.reshape(b, -1).at[:, 0].set(root)
        # Slots without an n-gram hold zeros. A token like any other: right if it is the target's.
        guesses = jax.vmap(lambda grams, root: grams[root])(state.pool.grams, root)
        tokens = jnp.concatenate([window, guesses.reshape(b, -1)], axis=1)
        return Proposal(tokens, self._shape(b)), state

    def update(self, models: Models, state: LookaheadState, verified: Verified) -> LookaheadState:
        """Every column of the window gives an n-gram; the window moves on by one position.

        By one even where more tokens were committed, as the authors do: moving on by all of them
        keeps positions right but loses columns, and found fewer n-grams when we tried it.
        """
        del models
        rows, w = self.ngram - 1, self.window
        b = verified.targets.shape[0]
        last = slice((rows - 1) * w, rows * w)
        new = verified.targets[:, last] if self.coupled else argmax(verified.logits[:, last])
        window = verified.proposal.tokens[:, : rows * w].reshape(b, rows, w)
        window = jnp.concatenate([window, new[:, None]], axis=1)  # [b, N, W]
        grams = jnp.swapaxes(window[:, 1:], 1, 2)
        pool = jax.vmap(insert)(state.pool, window[:, 0], grams, jnp.ones((b, w), bool))
        # Row 1 without its first column becomes the trajectory, whose first slot is the root's.
        return dataclasses.replace(state, window=window[:, 1:], pool=pool)

    def _insert_prompt(self, pool: Pool, tokens: Int[Array, " t"], length: Int[Array, ""]) -> Pool:
        def step(i: Int[Array, ""], pool: Pool) -> Pool:
            return self._insert_text(pool, tokens, i * _CHUNK, length, _CHUNK)

        return jax.lax.fori_loop(0, -(-tokens.shape[0] // _CHUNK), step, pool)

    def _insert_text(
        self,
        pool: Pool,
        tokens: Int[Array, " c"],
        seen: Int[Array, ""],
        length: Int[Array, ""],
        count: int,
    ) -> Pool:
        """Add the n-grams of one row's text that end at position `seen` or later.

        `count` of them at most: the first ones.
        """
        first = seen + 1 - self.ngram + jnp.arange(count, dtype=jnp.int32)
        index = first[:, None] + jnp.arange(self.ngram, dtype=jnp.int32)[None]
        grams = jnp.take(tokens, index, mode="clip")
        valid = (first >= 0) & (first + self.ngram <= length)
        return insert(pool, grams[:, 0], grams[:, 1:], valid)

    def _shape(self, batch: int) -> Shape:
        def rows(x: np.ndarray) -> jax.Array:
            return jnp.broadcast_to(jnp.asarray(x)[None], (batch, *x.shape))

        return Shape(rows(self.parents), rows(self.depths), rows(self.ancestors))
