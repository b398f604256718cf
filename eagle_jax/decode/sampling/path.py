"""`Path`: the text that leads to every node of a tree; penalties and bad words depend on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from eagle_jax.decode.tree import Shape
from eagle_jax.types import Logits

ABSENT = -1  # marks positions before the start of a text
_UNROLL = 16  # steps along a path that are unrolled; longer paths run in a loop

# (logits, whether each token occurs in the prompt, its count in the answer) -> logits.
Rule = Callable[
    [Float[Array, "b t x"], Bool[Array, "b _ x"], Int[Array, "b _ x"]], Float[Array, "b t x"]
]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Path:
    """The text that ends at each node of each row's tree.

    It consists of the committed text, whose last token is the root, followed by the drafted tokens
    on the path from the root to the node.

    Attributes:
        tokens: [b, c] committed tokens, prompt included; entries from `length` on are meaningless.
        length: [b] committed tokens.
        prompt: [b] length of the prompt in tokens.
        drafted: [b, t] the nodes' tokens, root first.
        shape: the form of the trees.
        longest: n, nodes on the longest path, including the root; static.
    """

    tokens: Int[Array, "b c"]
    length: Int[Array, " b"]
    prompt: Int[Array, " b"]
    drafted: Int[Array, "b t"]
    shape: Shape
    longest: int = dataclasses.field(metadata={"static": True})

    def answered(self) -> Int[Array, "b t"]:
        """Returns how many answer tokens the text of each node has."""
        return (self.length - self.prompt)[:, None] + self.shape.depth

    def recent(self, count: int) -> Int[Array, "b t {count}"]:
        """Returns the last `count` tokens of each node's text, newest first, or `ABSENT`."""
        b, t = self.drafted.shape

        def step(node: Int[Array, "b t"], back: Int[Array, ""]) -> tuple[Array, Array]:
            depth = self.shape.depth - back
            place = self.length[:, None] - 1 + depth
            committed = jnp.take_along_axis(self.tokens, place, axis=1, mode="clip")
            drafted = jnp.take_along_axis(self.drafted, node, axis=1, mode="clip")
            token = jnp.where(place >= 0, jnp.where(depth > 0, drafted, committed), ABSENT)
            return jnp.take_along_axis(self.shape.parents, node, axis=1, mode="clip"), token

        node = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32)[None], (b, t))
        back = jnp.arange(count, dtype=jnp.int32)
        _, found = jax.lax.scan(step, node, back, unroll=min(count, _UNROLL))
        return jnp.moveaxis(found, 0, 2)

    def penalise(self, logits: Logits, rule: Rule) -> Logits:
        """Apply a rule that depends on how often each token occurs in a node's text.

        All nodes of a row share the committed text, so the rule first runs on the whole [b, t, v]
        with the counts of that text. It then runs again for the few tokens on each node's drafted
        path, with the counts that include this path. A token that occurs twice on the path is
        written twice with the same value.
        """
        vocab, deep = logits.shape[-1], self.longest - 1
        in_prompt, count = self._committed(vocab)
        out = rule(logits, in_prompt[:, None], count[:, None])
        if deep == 0:
            return out
        ids = self.recent(deep)
        own = jnp.arange(deep)[None, None] < self.shape.depth[:, :, None]

        def add(again: Int[Array, "b t m"], one: tuple[Array, Array]) -> tuple[Array, None]:
            token, drafted = one
            same = (ids == token[:, :, None]) & drafted[:, :, None]
            return again + same.astype(jnp.int32), None

        each = jnp.moveaxis(ids, 2, 0), jnp.moveaxis(own, 2, 0)
        again, _ = jax.lax.scan(add, jnp.zeros_like(ids), each, unroll=min(deep, _UNROLL))

        def of_row(values: Array, ids: Int[Array, "t m"]) -> Array:
            return jnp.take(values, ids, mode="clip")

        times = jax.vmap(of_row)(count, ids) + again
        raw = jnp.take_along_axis(logits, ids, axis=2, mode="clip")
        new = rule(raw, jax.vmap(of_row)(in_prompt, ids), times)
        return put(out, jnp.where(own, ids, vocab), new)

    def _committed(self, vocab: int) -> tuple[Bool[Array, "b v"], Int[Array, "b v"]]:
        """Returns which tokens the prompt contains, and each token's count in the answer."""
        place = jnp.arange(self.tokens.shape[1], dtype=jnp.int32)[None]
        prompt = place < self.prompt[:, None]
        answer = (place < self.length[:, None]) & ~prompt

        def of_row(
            tokens: Int[Array, " c"], prompt: Bool[Array, " c"], answer: Bool[Array, " c"]
        ) -> tuple[Bool[Array, " v"], Int[Array, " v"]]:
            seen = jnp.zeros(vocab, bool).at[jnp.where(prompt, tokens, vocab)]
            counts = jnp.zeros(vocab, jnp.int32).at[jnp.where(answer, tokens, vocab)]
            return seen.set(True, mode="drop"), counts.add(1, mode="drop")

        return jax.vmap(of_row)(self.tokens, prompt, answer)


def put(logits: Logits, ids: Int[Array, "b t m"], values: Float[Array, "b t m"]) -> Logits:
    """Returns `logits` with `values` at the token `ids` of each node; ids >= v are dropped."""
    write = jax.vmap(jax.vmap(lambda row, i, x: row.at[i].set(x, mode="drop")))
    return write(logits, ids, values)
