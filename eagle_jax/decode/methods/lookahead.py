"""Lookahead decoding (arXiv 2402.02057): n-grams from Jacobi iteration, no draft model.

Every pass scores the root, a window of guessed future tokens, whose columns yield `window` new
n-grams per round, and `guesses` n-grams from the pool that begin with the root's token. Together
they form one tree, so the engine's acceptance needs no change.

The window has N-1 rows of W slots, row-major; slot (0, 0) is the root. Example with N = 4, W = 3,
G = 1, slots numbered, edges pointing from parent to child:

    row 0    0 -> 1 -> 2      the trajectory: slot (0, c) follows (0, c-1)
    row 1    3    4    5      (r, c) follows (r-1, c)
    row 2    6    7    8
    guess    0 -> 9 -> 10 -> 11

A slot's depth is r + c, and its ancestors are row 0 up to column c and column c up to row r, as in
the paper's mask. Accepting a path through the window, when the trajectory equals the target's own
text, is therefore as lossless as accepting a guess. The paper's verification branch does not accept
such paths (they are rare outside loops), and its code drops the bonus token after a fully accepted
guess. Here both are accepted at no cost.
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

_CHUNK = 64  # prompt n-grams inserted at once: work per step is quadratic, steps are prompt / 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pool:
    """N-grams by their first token: the latest G distinct ones of each token, oldest first.

    Attributes:
        grams: [*b, v, G, N-1] the tokens after the first; zeros from `count` on.
        count: [*b, v] number of n-grams of each first token.
    """

    grams: Int[Array, "*b v G m"]
    count: Int[Array, "*b v"]


def insert(
    pool: Pool, keys: Int[Array, " i"], grams: Int[Array, "i m"], valid: Bool[Array, " i"]
) -> Pool:
    """Returns one row's pool with n-grams added in order, computed in parallel.

    An n-gram that is already in the pool becomes the newest; if there is no room, the oldest one is
    removed. A key thus keeps its last G distinct n-grams, in the order of their latest occurrence.
    The place of an n-gram is determined by the number of distinct ones after it, so no loop over
    the n-grams is needed.

    Args:
        pool: the pool of one row.
        keys, grams: first tokens, and the N-1 tokens after each.
        valid: which of the n-grams to add.
    """
    vocab, room, _ = pool.grams.shape
    order = jnp.arange(keys.shape[0])
    later = order[None, :] > order[:, None]
    same_key = (keys[:, None] == keys[None, :]) & valid[None, :]  # [i, j]: j is valid
    same = same_key & jnp.all(grams[:, None] == grams[None, :], axis=-1)
    kept = valid & ~jnp.any(same & later, axis=1)
    newer = jnp.sum(same_key & later & kept[None, :], axis=1)  # distinct n-grams after each one

    # The old n-grams of each key, and which of them are not added again.
    old = pool.grams[keys]  # [i, G, m]
    again = jnp.all(old[:, None] == grams[None, :, None], axis=-1) & same_key[:, :, None]
    stays = (jnp.arange(room)[None] < pool.count[keys][:, None]) & ~jnp.any(again, axis=1)
    fresh = jnp.sum(same_key & kept[None, :], axis=1)
    left = jnp.cumsum(stays[:, ::-1], axis=1)[:, ::-1]  # number that stay, from each one on
    total = jnp.minimum(fresh + left[:, 0], room)

    # Each key's newest n-gram also writes the old ones, so no slot is written twice.
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
        window: [b, N-1, W] guessed tokens; slot (0, 0) is not read, the root replaces it.
        pool: the n-gram pool of every row.
        seen: [b] number of committed tokens whose n-grams are in the pool (with `prompt_pool`).
    """

    window: Int[Array, "b r w"]
    pool: Pool
    seen: Int[Array, " b"]


@dataclasses.dataclass(frozen=True)
class Lookahead:
    """Lookahead decoding.

    A pass scores (N-1)(W+G) tokens: 56 by default, the authors' setting for 7B models; on an A100
    the paper uses N = 5 and W = G = 15. The pool takes 4 v G (N-1) bytes per row: 3.4 MiB for
    v = 32000 and the defaults, 29 MiB for v = 128256 and G = 15.

    The paper fills the window row by row in N-2 passes before it verifies anything. Here the whole
    window starts with tokens of the prompt, which the same number of rounds replaces.

    Attributes:
        ngram: N, length of an n-gram; a round commits up to N-1 guessed tokens and the bonus token.
            With N = 2 the window is its first row only (plain Jacobi iteration), and guesses have
            one token.
        window: W, columns of the window: n-grams found per round.
        guesses: G, n-grams verified per round, and stored per first token.
        prompt_pool: whether to add the n-grams of the prompt and of the answer to the pool, which
            then includes the matches of prompt lookup; off by default in the authors' code.
        coupled: whether new window tokens are the target's draws with the noise of their positions.
            At temperature > 0 the trajectory then converges to the text that will be sampled, as
            long as rounds commit one token each. Otherwise they are the likeliest tokens, as in the
            authors' code.
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
        """Depth of the deepest node: the last one of a guess or of the window."""
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
        """[t, t] which nodes each node attends to."""
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
        """Returns a window of tokens from the prompt, and a pool with the prompt's n-grams."""
        del slots
        b = prompt.tokens.shape[0]
        rows, vocab = self.ngram - 1, models.target.embed_tokens.embedding[...].shape[0]
        # Fibonacci hashing spreads the choice over the prompt and is the same in every run.
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
        # Empty slots of the pool hold token 0, a valid draft that is accepted if it is right.
        guesses = jax.vmap(lambda grams, root: grams[root])(state.pool.grams, root)
        tokens = jnp.concatenate([window, guesses.reshape(b, -1)], axis=1)
        return Proposal(tokens, self._shape(b)), state

    def update(self, models: Models, state: LookaheadState, verified: Verified) -> LookaheadState:
        """Adds the n-gram of every column to the pool and moves the window by one position.

        The window moves by one even if more tokens were committed, as in the authors' code. Moving
        it by all of them would keep the positions right but lose columns and find fewer n-grams.
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
        # Row 1 becomes the trajectory; its first slot is then replaced by the root.
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
        """Adds the n-grams of one row's text that end at position `seen` or later.

        It adds the first `count` of them at most.
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
