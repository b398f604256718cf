"""Estimates the acceptance length of any tree from the recorded rounds of one wide tree.

A `Recorder` wraps a method, decodes as it does, and records which nodes every round accepts.
EAGLE's `PoolRecorder` (`eagle_jax.drafters.eagle.tuning`) also records the scores of a dynamic
tree's whole pool. Counting in these records gives the acceptance of any smaller tree. The
acceptance of methods that copy from the text is counted on finished answers, without a model.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from eagle_jax.decode.instrument import Wrapper
from eagle_jax.decode.method import Context, Method, Models, Prompt, Verified
from eagle_jax.decode.methods.prompt_lookup import lookup
from eagle_jax.decode.tree import DynamicTree, Proposal, StaticTree, chain

NOTHING = -1  # marks depths where no drafted token was accepted
LONGEST_COPY = 16  # longest copied draft that is considered, in tokens
COPY = {"max_ngram": 16, "latest": True, "truncate": True}  # settings of the lookup


# --- Methods that keep a record ----------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Record:
    """The state of a recorded method, and the record of its rounds.

    Attributes:
        inner: the method's own state.
        now: data of this round's proposal that the record needs after verification.
        nodes: [b, r, n] accepted nodes of each round by depth, or `NOTHING`.
        scores: [b, r, p] scores of the pool in each round (p = 0 without a pool).
        count: [b] number of recorded rounds.
    """

    inner: Any
    now: Any
    nodes: Int[Array, "b r n"]
    scores: Float[Array, "b r p"]
    count: Int[Array, " b"]


def empty_record(inner: Any, now: Any, rows: int, rounds: int, depth: int, pool: int) -> Record:
    """Returns an empty record with room for `rounds` rounds of each row."""
    return Record(
        inner,
        now,
        jnp.full((rows, rounds, depth), NOTHING, jnp.int32),
        jnp.zeros((rows, rounds, pool), jnp.float32),
        jnp.zeros(rows, jnp.int32),
    )


def noted(state: Record, verified: Verified, nodes: Array, scores: Array, inner: Any) -> Record:
    """Returns `state` with this round added to the record of each unfinished row."""
    depth = jnp.arange(1, nodes.shape[1] + 1)
    nodes = jnp.where(depth[None] < verified.committed[:, None], nodes, NOTHING)
    took_part = verified.committed > 0
    place = jnp.where(took_part, state.count, state.nodes.shape[1])
    put = jax.vmap(lambda rows, i, x: rows.at[i].set(x, mode="drop"))
    return dataclasses.replace(
        state,
        inner=inner,
        nodes=put(state.nodes, place, nodes),
        scores=put(state.scores, place, scores),
        count=state.count + took_part.astype(jnp.int32),
    )


@dataclasses.dataclass(frozen=True)
class Recorder(Wrapper):
    """A wrapper that records a method's accepted nodes, for up to `rounds` rounds per row."""

    rounds: int = 64

    def init(self, models: Models, prompt: Prompt, slots: int) -> Record:
        rows = prompt.tokens.shape[0]
        inner = super().init(models, prompt, slots)
        return empty_record(inner, (), rows, self.rounds, self.depth, 0)

    def propose(self, models: Models, context: Context, state: Record) -> tuple[Proposal, Record]:
        proposal, inner = super().propose(models, context, state.inner)
        return proposal, dataclasses.replace(state, inner=inner)

    def update(self, models: Models, state: Record, verified: Verified) -> Record:
        inner = super().update(models, state.inner, verified)
        none = jnp.zeros((state.count.shape[0], 0), jnp.float32)
        return noted(state, verified, verified.path[:, 1:], none, inner)


# --- Estimates from the records ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Rounds of a static tree: `ranks` [e, n] of accepted nodes by depth, or `NOTHING`."""

    ranks: np.ndarray

    @classmethod
    def of(cls, records: Sequence[Record], tree: StaticTree) -> Ranks:
        nodes = np.concatenate([_rounds(record)[0] for record in records])
        return cls(np.where(nodes == NOTHING, NOTHING, tree.ranks[nodes]))

    def tau(self, tree: StaticTree) -> float:
        """Returns the mean acceptance length τ of a tree, the bonus token included."""
        paths, total = set(tree.paths), 0
        for row in self.ranks.tolist():
            depth = 0
            while depth < len(row) and tuple(row[: depth + 1]) in paths:
                depth += 1
            total += 1 + depth
        return total / max(len(self.ranks), 1)

    def accuracy(self, widest: int) -> list[list[float]]:
        """Returns, by depth and rank, how often a candidate was accepted if its parent was."""
        out, reached = [], len(self.ranks)
        for level in self.ranks.T:
            counts = [int(np.sum(level == rank)) for rank in range(widest)]
            # A candidate that was never accepted counts as half an acceptance, less at lower ranks.
            chances = [max(c, 0.5 / (rank + 1)) / (reached + 1) for rank, c in enumerate(counts)]
            out.append(chances)
            reached = int(np.sum(level != NOTHING))
        return out


@dataclasses.dataclass(frozen=True)
class Pools:
    """Rounds of EAGLE's dynamic tree.

    Attributes:
        tree: the tree of the probe.
        index: [e, n] pool indices of the accepted candidates by depth, or `NOTHING`.
        scores: [e, p] scores of all candidates in the pool.
    """

    tree: DynamicTree
    index: np.ndarray
    scores: np.ndarray

    @classmethod
    def of(cls, records: Sequence[Record], tree: DynamicTree) -> Pools:
        index, scores = zip(*map(_rounds, records), strict=True)
        return cls(tree, np.concatenate(index), np.concatenate(scores))

    def ranks(self) -> Ranks:
        """Returns each accepted candidate's rank among its siblings, for static trees."""
        # The pool lists k candidates of every frontier node, best first.
        return Ranks(np.where(self.index == NOTHING, NOTHING, self.index % self.tree.k))

    def tau(self, tree: DynamicTree) -> float:
        """Returns the mean τ of a tree no larger than the probe's, the bonus token included.

        For a smaller `k` the estimate is slightly low, because here more candidates compete for a
        place in the tree than in a pool of that `k`.
        """
        accepted = self.index != NOTHING
        index = np.maximum(self.index, 0)
        scores = np.take_along_axis(self.scores, index, axis=1)
        # A node must be one of the k best siblings, and its parent one of the k best of its depth.
        alive = accepted & (index % self.tree.k < tree.k)
        alive[:, 1:] &= (self._level_rank(index, scores) < tree.k)[:, :-1]
        last = self.tree.k + (tree.depth - 1) * self.tree.k**2  # size of the pool at that depth
        above = self.scores[:, None, :last] > scores[:, :, None]
        alive &= above.sum(axis=2) < tree.drafted
        alive[:, tree.depth :] = False
        return float(1 + np.cumprod(alive, axis=1).sum(axis=1).mean())

    def _level_rank(self, index: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """Returns [e, n] the number of candidates of the same depth with a better score."""
        k, out = self.tree.k, np.zeros(index.shape, int)
        for depth in range(index.shape[1]):
            level = slice(0, k) if depth == 0 else slice(k + (depth - 1) * k**2, k + depth * k**2)
            out[:, depth] = (self.scores[:, level] > scores[:, depth, None]).sum(axis=1)
        return out


def _rounds(record: Record) -> tuple[np.ndarray, np.ndarray]:
    """Returns [e, n] nodes and [e, p] scores of the recorded rounds of all rows."""
    nodes, scores, count = (np.asarray(x) for x in (record.nodes, record.scores, record.count))
    valid = np.arange(nodes.shape[1])[None] < count[:, None]
    return nodes[valid], scores[valid]


# --- Copies from the text ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Copies:
    """What prompt lookup would copy at each position of a finished answer.

    Attributes:
        matched: [t] length of the longest suffix that occurs earlier in the text.
        right: [t] number of tokens copied after that occurrence that match the answer.
    """

    matched: np.ndarray
    right: np.ndarray

    @classmethod
    def of(cls, prompt: Sequence[int], answer: Sequence[int], positions: int) -> Copies:
        """Looks up every position; all answers share a program for `positions` answer tokens."""
        n = len(answer)
        # Leaves room for a draft after the last position; powers of two let texts share a program.
        size = 1 << (len(prompt) + positions + LONGEST_COPY - 1).bit_length()
        text = np.zeros(size, np.int32)
        text[: len(prompt) + n] = [*prompt, *answer]
        lengths = len(prompt) + np.minimum(np.arange(positions), max(n - 1, 0))
        drafted, matched = _lookup(text, lengths.astype(np.int32))
        right = np.zeros(n, int)
        for i in range(n):
            same = np.asarray(drafted)[i, : n - i] == np.asarray(answer[i : i + LONGEST_COPY])
            right[i] = int(np.cumprod(same).sum())
        return cls(np.asarray(matched)[:n], right)

    def walk(self, length: int, at_least: int = 0, otherwise: float = 1.0) -> tuple[int, int]:
        """Returns how many rounds copy and how many do not, until the end of the answer.

        Args:
            length: number of tokens in a copied draft.
            at_least: length of the shortest match that is used.
            otherwise: number of tokens committed by a round that does not copy.
        """
        at, copying, others = 0.0, 0, 0
        while at < len(self.right):
            if self.matched[int(at)] >= at_least:
                at, copying = at + 1 + min(int(self.right[int(at)]), length), copying + 1
            else:
                at, others = at + otherwise, others + 1
        return copying, others


@jax.jit
def _lookup(text: Int[Array, " c"], lengths: Int[Array, " t"]) -> Any:
    texts = jnp.broadcast_to(text[None], (lengths.shape[0], text.shape[0]))
    return lookup(texts, lengths, LONGEST_COPY, COPY["max_ngram"], 1, True, True)


def pooled(prompt: Sequence[int], answer: Sequence[int], ngram: int, guesses: int) -> int:
    """Returns the rounds that lookahead needs for an answer with only the text's own n-grams."""
    pool: dict[int, collections.deque[tuple[int, ...]]] = {}
    text = [*prompt, *answer]
    seen, at, rounds = 0, len(prompt), 0
    while at < len(text):
        for start in range(seen, at - ngram + 1):
            grams = pool.setdefault(text[start], collections.deque(maxlen=guesses))
            gram = tuple(text[start + 1 : start + ngram])
            if gram in grams:
                grams.remove(gram)
            grams.append(gram)
        seen = max(at - ngram + 1, seen)
        right = (_common(gram, text[at:]) for gram in pool.get(text[at - 1], ()))
        at, rounds = at + 1 + max(right, default=0), rounds + 1
    return rounds


def _common(gram: Sequence[int], text: Sequence[int]) -> int:
    count = 0
    while count < min(len(gram), len(text)) and gram[count] == text[count]:
        count += 1
    return count


def static(method: Method) -> StaticTree:
    """Returns the tree that a recorded method's node numbers refer to."""
    tree = getattr(method, "tree", None)
    return tree if isinstance(tree, StaticTree) else chain(method.depth)
