"""EAGLE with a lookup switch: where the text repeats itself at length, copying beats the head.

If a long suffix of the committed text has occurred before, its continuation is drafted as a chain;
otherwise EAGLE's tree is (the idea of SAM decoding, arXiv 2411.10666, with plain matching).
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
    """EAGLE, unless the last tokens have stood in the text before.

    Attributes:
        eagle: what drafts by default.
        lookup: what drafts where it finds a match; its `min_ngram` is the length that counts.
    """

    eagle: Eagle = Eagle()
    lookup: PromptLookup = PromptLookup(
        max_ngram=16, min_ngram=8, length=16, latest=True, truncate=True
    )
    rule: Rule = dataclasses.field(default=Exact(), init=False)

    wraps: ClassVar[str] = "eagle"  # the field with the method that drafts

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
        # Nobody drafts where every row copies.
        tree = jax.lax.cond(jnp.all(found), lambda: copied, grown)

        def choose(a: jax.Array, c: jax.Array) -> jax.Array:
            return jnp.where(jnp.expand_dims(found, range(1, a.ndim)), a, c)

        return jax.tree.map(choose, copied, tree), state

    def update(self, models: Models, state: EagleState, verified: Verified) -> EagleState:
        return self.eagle.update(models, state, verified)


def eagle_lookup() -> EagleLookup:
    """What `method="eagle_lookup"` stands for."""
    return EagleLookup(Eagle(default_tree()))


def _widen(state: EagleState, rows: int) -> EagleState:
    """Room for the features of as many tokens as a round can commit here."""
    missing = rows - state.features.shape[1]
    features = jnp.pad(state.features, ((0, 0), (0, missing), (0, 0)))
    return dataclasses.replace(state, features=features)


def _pad(proposal: Proposal, nodes: int) -> Proposal:
    """More nodes: children of the root that repeat its token. What is right may be accepted."""
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
