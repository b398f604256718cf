"""Medusa (arXiv 2401.10774): heads on one feature draft every depth of a static tree at once."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from eagle_jax.checks import check_flag
from eagle_jax.decode.acceptance import Exact, Rejection
from eagle_jax.decode.method import Context, Models, Prompt, Rule, Verified
from eagle_jax.decode.sampling import perturb
from eagle_jax.decode.top_k import top_k
from eagle_jax.decode.tree import Proposal, StaticTree, best_tree, check_tree
from eagle_jax.drafters.medusa.config import MedusaConfig
from eagle_jax.params import Params

# For each head, how often its candidate of rank 0, 1, ... is the token that greedy decoding emits,
# measured by train/medusa_tree.py with the heads of the "tiny" target on 80 Alpaca questions.
ACCURACY = (
    (0.216, 0.081, 0.049, 0.037, 0.029, 0.030, 0.022, 0.021, 0.017, 0.015),
    (0.134, 0.060, 0.040, 0.033, 0.028, 0.023, 0.022, 0.015, 0.013, 0.015),
    (0.127, 0.055, 0.039, 0.028, 0.021, 0.021, 0.019, 0.017, 0.014, 0.012),
)
TREE = best_tree(ACCURACY, 63)


@dataclasses.dataclass(frozen=True)
class Medusa:
    """Decoding with Medusa-1 heads.

    Attributes:
        tree: a static tree; its depth is at most the number of heads.
        coupled: whether to rank candidates with the noise that the target will draw with.
        rule: `Exact`, or `Typical`, the paper's rule for temperature > 0, which is lossy.
    """

    tree: StaticTree = TREE
    coupled: bool = True
    rule: Rule = Exact()
    draft: str = dataclasses.field(default="medusa", init=False)

    def __post_init__(self) -> None:
        check_tree(self.tree)

    @property
    def nodes(self) -> int:
        return self.tree.nodes

    @property
    def depth(self) -> int:
        return self.tree.depth

    def check(self, params: Params) -> None:
        config = params.drafts["medusa"].config
        assert isinstance(config, MedusaConfig)
        check_flag("coupled", self.coupled)
        if isinstance(self.rule, Rejection):
            raise ValueError(
                f"rule={self.rule}: Medusa draws no candidates that it could weigh; use Exact() or "
                "Typical()"
            )
        if not isinstance(self.tree, StaticTree):
            raise ValueError(f"tree={self.tree}: Medusa fills a static tree; give rank paths")
        if not 1 <= self.tree.depth <= config.num_heads:
            raise ValueError(
                f"tree of depth {self.tree.depth}: the draft has {config.num_heads} heads; use a "
                "tree of depth 1 to that"
            )
        widest = int(self.tree.ranks.max())
        if widest >= config.vocab_size:
            raise ValueError(f"tree rank {widest}: the vocabulary has {config.vocab_size} tokens")

    def init(self, models: Models, prompt: Prompt, slots: int) -> Float[Array, "b d"]:
        """Returns the feature of the token before the root; zeros if there is no such token."""
        del models, slots
        assert prompt.features is not None
        before = jnp.maximum(prompt.length - 2, 0)[:, None, None]
        feature = jnp.take_along_axis(prompt.features, before, axis=1, mode="clip")[:, 0]
        return jnp.where((prompt.length > 1)[:, None], feature, jnp.zeros_like(feature))

    def propose(
        self, models: Models, context: Context, state: Float[Array, "b d"]
    ) -> tuple[Proposal, Float[Array, "b d"]]:
        tree, tokens = self.tree, [context.root()[:, None]]
        scores = models.draft.logits(state[:, None], models.target)
        for depth in range(1, tree.depth + 1):
            level = scores[depth - 1][:, 0]
            if self.coupled and context.noise is not None:
                level = perturb(level, context.noise[:, depth - 1], context.sampling)
            ranks = tree.ranks[np.flatnonzero(tree.depths == depth)]
            _, best = top_k(level, int(ranks.max()) + 1)
            tokens.append(best[:, ranks])
        tokens = jnp.concatenate(tokens, axis=1)
        return Proposal(tokens, tree.shape(tokens.shape[0])), state

    def update(
        self, models: Models, state: Float[Array, "b d"], verified: Verified
    ) -> Float[Array, "b d"]:
        del models, state
        last = jnp.maximum(verified.committed - 1, 0)[:, None]
        node = jnp.take_along_axis(verified.path, last, axis=1, mode="clip")[:, :, None]
        return jnp.take_along_axis(verified.output.features, node, axis=1, mode="clip")[:, 0]
