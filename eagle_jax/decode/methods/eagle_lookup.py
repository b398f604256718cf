"""EAGLE that switches to prompt lookup where the text repeats a long passage.

If a long suffix of the committed text has occurred before, the method drafts its continuation as a
chain; otherwise it drafts EAGLE's tree. This is the idea of SAM decoding (arXiv 2411.10666), with
plain matching.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from eagle_jax.checks import short
from eagle_jax.decode.acceptance import Exact
from eagle_jax.decode.method import Context, Models, Prompt, Rule, Verified
from eagle_jax.decode.methods.prompt_lookup import PromptLookup, lookup
from eagle_jax.decode.tree import Proposal, Shape, chain
from eagle_jax.drafters.eagle.method import Eagle, EagleState, default_tree
from eagle_jax.params import Params


@dataclasses.dataclass(frozen=True)
class EagleLookup:
    """EAGLE, except in rounds where the last tokens have occurred in the text before.

    Attributes:
        eagle: the method that drafts by default.
        lookup: the method that drafts if it finds a match of at least its `min_ngram` tokens.
    """

    eagle: Eagle = Eagle()
    lookup: PromptLookup = PromptLookup(
        max_ngram=16, min_ngram=8, length=16, latest=True, truncate=True
    )
    rule: Rule = dataclasses.field(default=Exact(), init=False)

    wraps: ClassVar[str] = "eagle"  # name of the field that holds the wrapped method

    def __post_init__(self) -> None:
        for name, kind in (("eagle", Eagle), ("lookup", PromptLookup)):
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise ValueError(f"{name}={short(value)}: must be an instance of {kind.__name__}")

    @property
    def draft(self) -> str:
        return self.eagle.draft

    @property
    def nodes(self) -> int:
        return max(self.eagle.nodes, self.lookup.nodes)

    @property
    def depth(self) -> int:
        return max(self.eagle.depth, self.lookup.depth)

    def check(self, params: Params) -> None:
        self.eagle.check(params)
        self.lookup.check(params)

    def init(self, models: Models, prompt: Prompt, slots: int) -> EagleState:
        return _widen(self.eagle.init(models, prompt, slots), self.depth + 1)

    def propose(
        self, models: Models, context: Context, state: EagleState
    ) -> tuple[Proposal, EagleState]:
        b = context.length.shape[0]
        find = self.lookup
        copied, matched = lookup(
            context.tokens,
            context.length,
            find.length,
            find.max_ngram,
            find.min_ngram,
            find.latest,
            find.truncate,
        )
        copied = Proposal(
            jnp.concatenate([context.root()[:, None], copied], axis=1),
            chain(self.lookup.length).shape(b),
        )
        feature, state = self.eagle.catch_up(models, context, state)

        def grown() -> Proposal:
            return _pad(self.eagle.grow(models, context, state, feature), self.nodes)

        copied, found = _pad(copied, self.nodes), matched > 0
        # If every row has a match, EAGLE's tree is not needed and its drafting is skipped.
        tree = jax.lax.cond(jnp.all(found), lambda: copied, grown)

        def choose(a: jax.Array, c: jax.Array) -> jax.Array:
            return jnp.where(jnp.expand_dims(found, range(1, a.ndim)), a, c)

        return jax.tree.map(choose, copied, tree), state

    def update(self, models: Models, state: EagleState, verified: Verified) -> EagleState:
        return self.eagle.update(models, state, verified)


def eagle_lookup() -> EagleLookup:
    """Returns the default method for `method="eagle_lookup"`."""
    return EagleLookup(Eagle(default_tree()))


def _widen(state: EagleState, rows: int) -> EagleState:
    """Returns the state with room for the features of `rows` tokens, the most per round."""
    missing = rows - state.features.shape[1]
    features = jnp.pad(state.features, ((0, 0), (0, missing), (0, 0)))
    return dataclasses.replace(state, features=features)


def _pad(proposal: Proposal, nodes: int) -> Proposal:
    """Returns a proposal padded to `nodes` with children of the root that repeat its token.

    A padding node is a valid draft and is accepted if it happens to be right.
    """
    b, t = proposal.tokens.shape
    more, shape = nodes - t, proposal.shape
    root = jnp.broadcast_to(proposal.tokens[:, :1], (b, more))
    own = jnp.eye(nodes, dtype=bool)[t:].at[:, 0].set(True)
    ancestors = jnp.pad(shape.ancestors, ((0, 0), (0, 0), (0, more)))
    return Proposal(
        jnp.concatenate([proposal.tokens, root], axis=1),
        Shape(
            jnp.pad(shape.parents, ((0, 0), (0, more))),
            jnp.pad(shape.depth, ((0, 0), (0, more)), constant_values=1),
            jnp.concatenate([ancestors, jnp.broadcast_to(own[None], (b, more, nodes))], axis=1),
        ),
    )
