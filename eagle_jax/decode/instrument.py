"""Methods that wrap other methods for measurements; each changes or records one thing.

They are not meant for users' decoding and have no options on the command line.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from eagle_jax.decode.acceptance import Exact
from eagle_jax.decode.method import Context, Method, Models, Prompt, Rule, Verified
from eagle_jax.decode.methods.vanilla import Vanilla
from eagle_jax.decode.tree import Proposal, StaticTree
from eagle_jax.params import Params


@dataclasses.dataclass(frozen=True)
class Wrapper:
    """A method that delegates to `inner`; subclasses override what differs."""

    inner: Any

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

    def init(self, models: Models, prompt: Prompt, slots: int) -> Any:
        return self.inner.init(models, prompt, slots)

    def propose(self, models: Models, context: Context, state: Any) -> tuple[Proposal, Any]:
        return self.inner.propose(models, context, state)

    def update(self, models: Models, state: Any, verified: Verified) -> Any:
        return self.inner.update(models, state, verified)


@dataclasses.dataclass(frozen=True)
class FixedTree(Wrapper):
    """Vanilla decoding that also verifies a constant tree, which is rarely accepted.

    All drafted tokens are token 0, so a round costs the target's pass over the tree but no
    drafting.

    Attributes:
        tree: the tree to verify.
    """

    inner: Method = dataclasses.field(default=Vanilla(), init=False)
    tree: StaticTree

    @property
    def nodes(self) -> int:
        return self.tree.nodes

    @property
    def depth(self) -> int:
        return self.tree.depth

    def propose(self, models: Models, context: Context, state: Any) -> tuple[Proposal, Any]:
        del models
        root = context.root()
        tokens = jnp.zeros((root.shape[0], self.nodes), root.dtype).at[:, 0].set(root)
        return Proposal(tokens, self.tree.shape(root.shape[0])), state


def wide_pass(nodes: int) -> FixedTree:
    """Returns a method whose round is one target pass over `nodes` tokens (at least 2)."""
    return FixedTree(StaticTree(tuple((rank,) for rank in range(nodes - 1))))


@dataclasses.dataclass(frozen=True)
class WithRule(Wrapper):
    """A method that uses `rule` instead of the acceptance rule of `inner`."""

    rule: Rule = Exact()
