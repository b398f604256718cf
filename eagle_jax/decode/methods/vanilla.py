"""Vanilla decoding: a tree of one node, the baseline for every speedup in this project."""

from __future__ import annotations

import dataclasses

from eagle_jax.decode.acceptance import Exact
from eagle_jax.decode.method import Context, Models, Prompt, Rule, Verified
from eagle_jax.decode.tree import Proposal, StaticTree
from eagle_jax.params import Params


@dataclasses.dataclass(frozen=True)
class Vanilla:
    """Vanilla autoregressive decoding: one token per target pass."""

    nodes: int = dataclasses.field(default=1, init=False)
    depth: int = dataclasses.field(default=0, init=False)
    draft: None = dataclasses.field(default=None, init=False)
    rule: Rule = dataclasses.field(default=Exact(), init=False)

    def check(self, params: Params) -> None:
        del params

    def init(self, models: Models, prompt: Prompt, slots: int) -> tuple[()]:
        del models, prompt, slots
        return ()

    def propose(
        self, models: Models, context: Context, state: tuple[()]
    ) -> tuple[Proposal, tuple[()]]:
        del models
        root = context.root()
        return Proposal(root[:, None], StaticTree(()).shape(root.shape[0])), state

    def update(self, models: Models, state: tuple[()], verified: Verified) -> tuple[()]:
        del models, verified
        return state
