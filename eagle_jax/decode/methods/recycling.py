"""Token recycling (arXiv 2408.08696): drafts from the candidates of earlier target passes.

Every pass computes the likeliest next tokens of every node and uses only one of them. A matrix
stores the others too, `width` per token of the vocabulary, and the next tree is read from it level
by level: the child of rank r is the r-th likeliest token in the latest candidates for its parent's
token. There is no draft model.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from eagle_jax.checks import check_flag
from eagle_jax.decode.acceptance import Exact
from eagle_jax.decode.method import Context, Models, Prompt, Rule, Verified
from eagle_jax.decode.top_k import top_k
from eagle_jax.decode.tree import Proposal, StaticTree, best_tree, check_levels, check_tree
from eagle_jax.params import Params

# An assumption, not a measurement: at every depth the best candidate is right with probability
# 0.45, and each lower rank half as often as the one before. The last of 60 drafted nodes then adds
# 0.01 tokens per round.
ACCURACY = (tuple(0.45 * 0.5**rank for rank in range(8)),) * 6
_TREE = best_tree(ACCURACY, 60)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecyclingState:
    """The candidate matrix of each row.

    Attributes:
        tokens: [b, v, width] likeliest tokens after each token, best first; zeros at the start.
        logits: [b, v, width] their logits, or None without noise coupling.
    """

    tokens: Int[Array, "b v width"]
    logits: Float[Array, "b v width"] | None


@dataclasses.dataclass(frozen=True)
class Recycling:
    """Token recycling with a static tree; the matrix starts empty for every prompt ("cold").

    The prefill computes no vocabulary head, so the matrix fills from the first round on. It takes
    4 v width bytes per row, and twice that with noise coupling: 2 MiB for v = 32000.

    Attributes:
        tree: the static tree.
        width: candidates stored per token; the ranks of the tree must be smaller.
        coupled: whether to store the logits too and rank children with the noise that the target
            will draw with (no effect in greedy decoding); otherwise the stored order decides.
    """

    tree: StaticTree = _TREE
    width: int = 8
    coupled: bool = True
    draft: None = dataclasses.field(default=None, init=False)
    rule: Rule = dataclasses.field(default=Exact(), init=False)

    def __post_init__(self) -> None:
        check_tree(self.tree)

    @property
    def nodes(self) -> int:
        return self.tree.nodes

    @property
    def depth(self) -> int:
        return self.tree.depth

    def check(self, params: Params) -> None:
        vocab, width = params.target_config.vocab_size, self.width
        check_flag("coupled", self.coupled)
        if not isinstance(width, int) or isinstance(width, bool) or not 0 < width <= vocab:
            raise ValueError(f"width={width!r}: must be a whole number from 1 to {vocab}")
        if not isinstance(self.tree, StaticTree):
            raise ValueError(f"tree={self.tree}: recycling fills a static tree; give rank paths")
        if self.tree.depth < 1:
            raise ValueError("tree=(): no drafted node; give at least one path")
        check_levels("tree depth", self.tree.depth)
        widest = int(self.tree.ranks.max())
        if widest >= width:
            raise ValueError(f"tree rank {widest}: width={width} keeps fewer; raise width")

    def init(self, models: Models, prompt: Prompt, slots: int) -> RecyclingState:
        del slots
        vocab = models.target.embed_tokens.embedding[...].shape[0]
        shape = (prompt.tokens.shape[0], vocab, self.width)
        logits = jnp.zeros(shape, jnp.float32) if self.coupled else None
        return RecyclingState(jnp.zeros(shape, jnp.int32), logits)

    def propose(
        self, models: Models, context: Context, state: RecyclingState
    ) -> tuple[Proposal, RecyclingState]:
        del models
        tree = self.tree
        tokens = context.root()[:, None]
        for depth in range(1, tree.depth + 1):
            level = np.flatnonzero(tree.depths == depth)  # nodes are sorted by depth
            parents, row = np.unique(tree.parents[level], return_inverse=True)
            ranked = self._candidates(context, state, tokens[:, parents], depth)
            tokens = jnp.concatenate([tokens, ranked[:, row, tree.ranks[level]]], axis=1)
        return Proposal(tokens, tree.shape(tokens.shape[0])), state

    def update(self, models: Models, state: RecyclingState, verified: Verified) -> RecyclingState:
        """Returns the matrix updated at the token of every node, accepted or not."""
        del models
        tokens = verified.proposal.tokens
        logits, best = top_k(verified.logits, self.width)
        return RecyclingState(
            store(state.tokens, tokens, best),
            None if state.logits is None else store(state.logits, tokens, logits),
        )

    def _candidates(
        self, context: Context, state: RecyclingState, parents: Int[Array, "b m"], depth: int
    ) -> Int[Array, "b m width"]:
        """Returns the stored candidates of tokens whose children are at `depth`, best first."""
        gather = jax.vmap(lambda matrix, tokens: matrix[tokens])
        found = gather(state.tokens, parents)
        if state.logits is None or context.noise is None:
            return found
        noise = gather(context.noise[:, depth - 1], found)
        scores = context.sampling.scaled(gather(state.logits, parents)) + noise
        _, order = jax.lax.top_k(scores, self.width)
        return jnp.take_along_axis(found, order, axis=2)


def store(
    matrix: Shaped[Array, "b v width"],
    tokens: Int[Array, "b t"],
    values: Shaped[Array, "b t width"],
) -> Shaped[Array, "b v width"]:
    """Returns `matrix` with `matrix[tokens[i]] = values[i]` in every row.

    If a token occurs more than once, its last occurrence counts. A plain scatter would leave the
    order to the threads of a GPU.
    """
    t = tokens.shape[1]
    same = tokens[:, :, None] == tokens[:, None, :]
    replaced = jnp.any(same & jnp.triu(jnp.ones((t, t), bool), 1)[None], axis=2)
    index = jnp.where(replaced, matrix.shape[1], tokens)
    return jax.vmap(lambda m, i, x: m.at[i].set(x, mode="drop"))(matrix, index, values)
