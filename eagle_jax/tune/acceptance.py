"""How many drafted tokens any tree would get accepted, from what one wide tree was seen to get.

A `Recorder` is a method that decodes as the one it holds does and keeps a record of every round:
which nodes were accepted. EAGLE's `Probe` (`eagle_jax.drafters.eagle.tuning`) also records the
scores of a dynamic tree's whole pool. From these a smaller tree's acceptance follows by counting.
What is copied from the text itself is
counted on finished answers, without a model.
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

from eagle_jax.decode.method import Context, Method, Models, Prompt, Rule, Verified
from eagle_jax.decode.methods.prompt_lookup import lookup
from eagle_jax.decode.tree import DynamicTree, Proposal, StaticTree, chain
from eagle_jax.params import Params

NOTHING = -1  # where no drafted token was accepted
LONGEST_COPY = 16  # tokens of a copied draft that are counted
COPY = {"max_ngram": 16, "latest": True, "truncate": True}  # the lookup that is counted


# --- Methods that keep a record ----------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Record:
    """State of a method and what its rounds were seen to do.

    Attributes:
        inner: the method's own state.
        now: what of this round's proposal the record needs.
        nodes: [b, r, n] of every round the accepted nodes by depth, or `NOTHING`.
        scores: [b, r, p] of every round the scores of the pool (p = 0 without one).
        count: [b] rounds recorded.
    """

    inner: Any
    now: Any
    nodes: Int[Array, "b r n"]
    scores: Float[Array, "b r p"]
    count: Int[Array, " b"]


def empty_record(inner: Any, now: Any, rows: int, rounds: int, depth: int, pool: int) -> Record:
    """A record without rounds, with room for `rounds` of each row."""
    return Record(
        inner,
        now,
        jnp.full((rows, rounds, depth), NOTHING, jnp.int32),
        jnp.zeros((rows, rounds, pool), jnp.float32),
        jnp.zeros(rows, jnp.int32),
    )


def noted(state: Record, verified: Verified, nodes: Array, scores: Array, inner: Any) -> Record:
    """With this round in the record, unless the row is finished."""
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
class Recorder:
    """Any method; its record has the accepted nodes of up to `rounds` rounds a row."""

    inner: Any
    rounds: int

    @property
    def nodes(self) -> int:
        return self.inner.nodes

    @property
    def depth(self) -> int:
        return self.inner.depth

    @property
    def draft(self) -> str | None:
        return self.inner.draft

    @property
    def rule(self) -> Rule:
        return self.inner.rule

    def check(self, params: Params) -> None:
        self.inner.check(params)

    def init(self, models: Models, prompt: Prompt, slots: int) -> Record:
        rows = prompt.tokens.shape[0]
        inner = self.inner.init(models, prompt, slots)
        return empty_record(inner, (), rows, self.rounds, self.depth, 0)

    def propose(self, models: Models, context: Context, state: Record) -> tuple[Proposal, Record]:
        proposal, inner = self.inner.propose(models, context, state.inner)
        return proposal, dataclasses.replace(state, inner=inner)

    def update(self, models: Models, state: Record, verified: Verified) -> Record:
        inner = self.inner.update(models, state.inner, verified)
        none = jnp.zeros((state.count.shape[0], 0), jnp.float32)
        return noted(state, verified, verified.path[:, 1:], none, inner)


# --- What follows from the records -------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Rounds of a static tree: [e, n] the accepted nodes' ranks by depth, or `NOTHING`."""

    ranks: np.ndarray

    @classmethod
    def of(cls, records: Sequence[Record], tree: StaticTree) -> Ranks:
        nodes = np.concatenate([_rounds(record)[0] for record in records])
        return cls(np.where(nodes == NOTHING, NOTHING, tree.ranks[nodes]))

    def tau(self, tree: StaticTree) -> float:
        """Mean acceptance length of a tree, the bonus token included."""
        paths, total = set(tree.paths), 0
        for row in self.ranks.tolist():
            depth = 0
            while depth < len(row) and tuple(row[: depth + 1]) in paths:
                depth += 1
            total += 1 + depth
        return total / max(len(self.ranks), 1)

    def accuracy(self, widest: int) -> list[list[float]]:
        """By depth and rank, how often that candidate was right where its parent was."""
        out, reached = [], len(self.ranks)
        for level in self.ranks.T:
            counts = [int(np.sum(level == rank)) for rank in range(widest)]
            # A candidate never seen to be right may be: half a sighting, less for lower ranks.
            chances = [max(c, 0.5 / (rank + 1)) / (reached + 1) for rank, c in enumerate(counts)]
            out.append(chances)
            reached = int(np.sum(level != NOTHING))
        return out


@dataclasses.dataclass(frozen=True)
class Pools:
    """Rounds of EAGLE's dynamic tree.

    Attributes:
        tree: the probe's.
        index: [e, n] the accepted candidates' indices in the pool by depth, or `NOTHING`.
        scores: [e, p] of all candidates.
    """

    tree: DynamicTree
    index: np.ndarray
    scores: np.ndarray

    @classmethod
    def of(cls, records: Sequence[Record], tree: DynamicTree) -> Pools:
        index, scores = zip(*map(_rounds, records), strict=True)
        return cls(tree, np.concatenate(index), np.concatenate(scores))

    def ranks(self) -> Ranks:
        """Each accepted candidate's place among its siblings, for static trees."""
        # The pool lists k candidates of every frontier node, best first.
        return Ranks(np.where(self.index == NOTHING, NOTHING, self.index % self.tree.k))

    def tau(self, tree: DynamicTree) -> float:
        """Mean acceptance length of a tree within the probe's, the bonus token included.

        A little low where `k` is smaller: its pool lacks candidates that are ranked above here.
        """
        accepted = self.index != NOTHING
        index = np.maximum(self.index, 0)
        scores = np.take_along_axis(self.scores, index, axis=1)
        # Among its siblings, and its parent in the frontier, it must be one of the k best.
        alive = accepted & (index % self.tree.k < tree.k)
        alive[:, 1:] &= (self._level_rank(index, scores) < tree.k)[:, :-1]
        last = self.tree.k + (tree.depth - 1) * self.tree.k**2  # the pool of that depth
        above = self.scores[:, None, :last] > scores[:, :, None]
        alive &= above.sum(axis=2) < tree.drafted
        alive[:, tree.depth :] = False
        return float(1 + np.cumprod(alive, axis=1).sum(axis=1).mean())

    def _level_rank(self, index: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """[e, n] candidates of the same depth with a better score."""
        k, out = self.tree.k, np.zeros(index.shape, int)
        for depth in range(index.shape[1]):
            level = slice(0, k) if depth == 0 else slice(k + (depth - 1) * k**2, k + depth * k**2)
            out[:, depth] = (self.scores[:, level] > scores[:, depth, None]).sum(axis=1)
        return out


def _rounds(record: Record) -> tuple[np.ndarray, np.ndarray]:
    """[e, n] nodes and [e, p] scores of the recorded rounds of all rows."""
    nodes, scores, count = (np.asarray(x) for x in (record.nodes, record.scores, record.count))
    valid = np.arange(nodes.shape[1])[None] < count[:, None]
    return nodes[valid], scores[valid]


# --- Copies from the text ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Copies:
    """An answer, position by position.

    Attributes:
        matched: [t] length of the longest suffix that has stood in the text before.
        right: [t] how many tokens copied from there the answer goes on with.
    """

    matched: np.ndarray
    right: np.ndarray

    @classmethod
    def of(cls, prompt: Sequence[int], answer: Sequence[int], positions: int) -> Copies:
        """`positions`: longest answer, so that all answers share a compiled program."""
        n = len(answer)
        # Room for whole drafts after the last position; a power of two, for the same reason.
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
        """Rounds that copy, and others, to the answer's end.

        Args:
            length: tokens of a copied draft.
            at_least: shortest match that is copied from.
            otherwise: tokens committed by a round that does not copy.
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
    """Rounds that the n-grams of the text need for an answer: lookahead without its window."""
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
    """The tree that a recorded method's nodes are of."""
    tree = getattr(method, "tree", None)
    return tree if isinstance(tree, StaticTree) else chain(method.depth)
