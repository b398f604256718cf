"""EAGLE: drafts extrapolated from the target's features, verified as a token tree.

One method serves three papers: EAGLE-1 (arXiv 2401.15077) uses its head with a static tree, EAGLE-2
(2406.16858) the same head with a dynamic tree, and EAGLE-3 (2503.01840) another head. A round has
two steps:

1. catch-up: the draft reads the pairs (feature, next token) that the last round committed, with
   the target's own features, and appends their keys and values to its cache;
2. tree: level by level, each expanded node reads its parent's *predicted* state and its own token;
   these keys and values are dropped after the round.

The cache therefore never contains predicted states.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from eagle_jax.checks import check_flag, check_number
from eagle_jax.decode.acceptance import Exact
from eagle_jax.decode.method import Context, Models, Prompt, Rule, Verified
from eagle_jax.decode.prefill import fill
from eagle_jax.decode.sampling import process
from eagle_jax.decode.top_k import likeliest, top_k
from eagle_jax.decode.tree import (
    MC_SIM_7B_63,
    DynamicTree,
    Proposal,
    StaticTree,
    check_levels,
    check_tree,
    rerank,
    static_tree,
)
from eagle_jax.drafters.draft_vocabulary import size_of
from eagle_jax.models import cache as caches
from eagle_jax.models.transformer import packed_mask
from eagle_jax.params import Params
from eagle_jax.types import Hidden, KeyValue, Tokens

_LARGEST = 1000.0  # largest factor of scores; the smallest is 1 / _LARGEST

# The default on CPUs has one level, because draft steps and verified tokens are expensive there.
# Other devices use the paper's tree. `python -m eagle_jax.evaluate` compares trees.
_CPU_TREE = static_tree([[0], [1], [2]])


def default_tree() -> StaticTree:
    """Returns the tree that `method="eagle"` uses on this backend."""
    return _CPU_TREE if jax.default_backend() == "cpu" else MC_SIM_7B_63


def eagle() -> Eagle:
    """Returns the default method for `method="eagle"`: EAGLE-1."""
    return Eagle(default_tree())


def eagle2() -> Eagle:
    """Returns the default method for `method="eagle2"`: EAGLE-1's head with a dynamic tree."""
    return Eagle(DynamicTree())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EagleState:
    """Draft state between rounds.

    Attributes:
        cache: the draft's KV cache, computed from the target's own features.
        features: [b, n, a] target features of the last round's tokens, for the next catch-up.
        count: [b] number of valid entries in `features`.
    """

    cache: KeyValue
    features: Float[Array, "b n a"]
    count: Int[Array, " b"]


@dataclasses.dataclass(frozen=True)
class Eagle:
    """Decoding with EAGLE-1, EAGLE-2 and EAGLE-3.

    Attributes:
        tree: a static tree (also a chain), or the size of a dynamic tree.
        head: the kind of draft: "eagle" (EAGLE-1 and EAGLE-2), "eagle3", or any other kind whose
            module has the methods of `EagleDraft`.
        coupled: whether to rank children with the noise that the target will draw with, so that at
            temperature > 0 the draft follows the target's draw (noise coupling). Otherwise children
            are ranked by likelihood at temperature 1, as in EAGLE-2 and EAGLE-3 (EAGLE-1 samples
            children from the draft's distribution).
        confidence: factor of the draft's processed logits before noise is added. Values above 1
            sharpen the draft's distribution, which is flatter than the target's.
        sharpness: sharpens the scores of a dynamic tree under noise: a child's score is the log of
            its share in the softmax of `sharpness` times the perturbed logits.
    """

    tree: StaticTree | DynamicTree = MC_SIM_7B_63
    head: str = "eagle"
    coupled: bool = True
    confidence: float = 1.1
    sharpness: float = 1.0
    rule: Rule = dataclasses.field(default=Exact(), init=False)

    @property
    def draft(self) -> str:
        return self.head

    @property
    def nodes(self) -> int:
        return self.tree.nodes

    @property
    def depth(self) -> int:
        return self.tree.depth

    def __post_init__(self) -> None:
        check_tree(self.tree)

    def check(self, params: Params) -> None:
        config = params.drafts[self.head].config
        vocab = size_of(config) or config.vocab_size
        check_flag("coupled", self.coupled)
        for name in ("confidence", "sharpness"):
            check_number(name, getattr(self, name), 1 / _LARGEST, _LARGEST)
        check_levels("tree depth", self.tree.depth)
        if isinstance(self.tree, DynamicTree):
            if self.tree.k > vocab:
                raise ValueError(f"tree k={self.tree.k}: the draft knows {vocab} tokens; use fewer")
            return
        if self.tree.depth < 1:
            raise ValueError("tree=(): no drafted node; give at least one path")
        widest = int(self.tree.ranks.max())
        if widest >= vocab:
            raise ValueError(f"tree rank {widest}: the draft knows {vocab} tokens; use lower ranks")

    def init(self, models: Models, prompt: Prompt, slots: int) -> EagleState:
        """Runs the draft over the prompt, where pair i is (feature i, token i+1)."""
        features = prompt.features
        assert features is not None

        def run(pairs, positions, mask, cache, lengths):
            tokens, read = pairs
            prefix = None if cache is None else cache[0]
            embeddings, read = models.draft.embed(tokens, models.target), models.draft.fuse(read)
            _, block = models.draft(
                embeddings, read, positions, mask, prefix=prefix, lengths=lengths
            )
            return (), (block,)

        following = jnp.roll(prompt.tokens, -1, axis=1)  # the catch-up rewrites the last pair
        _, (cache,) = fill(run, (following, features), slots)
        # The first catch-up reads pair length-2, the newest one, whose token is the root.
        newest = jnp.maximum(prompt.length - 2, 0)[:, None, None]
        features = jnp.take_along_axis(features, newest, axis=1, mode="clip")
        padding = jnp.zeros((len(newest), self.depth, features.shape[-1]), features.dtype)
        count = jnp.minimum(prompt.length - 1, 1)  # a prompt of one token has no pair
        return EagleState(cache, jnp.concatenate([features, padding], axis=1), count)

    def propose(
        self, models: Models, context: Context, state: EagleState
    ) -> tuple[Proposal, EagleState]:
        feature, state = self.catch_up(models, context, state)
        return self.grow(models, context, state, feature), state

    def update(self, models: Models, state: EagleState, verified: Verified) -> EagleState:
        features = models.draft.features(verified.output)
        features = jnp.take_along_axis(features, verified.path[:, :, None], axis=1, mode="clip")
        return dataclasses.replace(state, features=features, count=verified.committed)

    def catch_up(
        self, models: Models, context: Context, state: EagleState
    ) -> tuple[Hidden, EagleState]:
        """Runs the draft on newly committed pairs; returns the root's predicted state [b, 1, d]."""
        b, n, _ = state.features.shape
        start = context.length - 1 - state.count
        step = jnp.arange(n, dtype=jnp.int32)[None]
        tokens = jnp.take_along_axis(context.tokens, start[:, None] + 1 + step, 1, mode="clip")
        output, block = models.draft(
            models.draft.embed(tokens, models.target),
            models.draft.fuse(state.features),
            start[:, None] + step,
            packed_mask(jnp.zeros((b, n), jnp.int32)),
            prefix=state.cache,
            lengths=start,
        )
        # Entries past `count` are meaningless; the next catch-up overwrites them.
        (cache,) = caches.write((state.cache,), (block,), start)
        last = jnp.maximum(state.count - 1, 0)[:, None, None]
        feature = jnp.take_along_axis(output, last, axis=1, mode="clip")
        return feature, dataclasses.replace(state, cache=cache)

    def grow(
        self,
        models: Models,
        context: Context,
        state: EagleState,
        feature: Float[Array, "b 1 d"],
    ) -> Proposal:
        """Drafts a tree below the root, whose predicted state is `feature` [b, 1, d]."""
        if isinstance(self.tree, DynamicTree):
            pool = self.pool(self.tree, models, context, state, feature)
            return rerank(*pool, context.root(), self.tree)
        tokens = self._static(self.tree, models, context, state, feature)
        return Proposal(tokens, self.tree.shape(tokens.shape[0]))

    def _static(
        self,
        tree: StaticTree,
        models: Models,
        context: Context,
        state: EagleState,
        feature: Float[Array, "b 1 d"],
    ) -> Tokens:
        """Drafts the tokens of a static tree, level by level."""
        b = feature.shape[0]
        tokens = [context.root()[:, None]]
        expanded: list[int] = []  # nodes that the draft has read so far, in block order
        parents = np.array([0])  # nodes whose predicted states are in `feature`, in this order
        before: KeyValue | None = None
        for depth in range(1, tree.depth + 1):
            level = np.flatnonzero(tree.depths == depth)
            row = np.searchsorted(parents, tree.parents[level])
            widest = int(tree.ranks[level].max()) + 1
            scores = self._scores(models, context, feature, depth)
            ranked = self._known(models, top_k(scores, widest)[1])
            tokens.append(ranked[:, row, tree.ranks[level]])
            inner = np.flatnonzero(np.isin(level, tree.parents[1:]))
            if not inner.size:
                break
            expanded += list(level[inner])
            mask = jnp.asarray(tree.ancestors[level[inner]][:, expanded])
            feature, before = self._feed(
                models,
                context,
                state,
                tokens[-1][:, inner],
                feature[:, row[inner]],
                depth,
                jnp.broadcast_to(mask[None], (b, *mask.shape)),
                before,
            )
            parents = level[inner]
        return jnp.concatenate(tokens, axis=1)

    def pool(
        self,
        tree: DynamicTree,
        models: Models,
        context: Context,
        state: EagleState,
        feature: Float[Array, "b 1 d"],
    ) -> tuple[Int[Array, "b p"], Float[Array, "b p"], Int[Array, "b p"]]:
        """Returns tokens, scores and parents of all candidates that a dynamic tree expands."""
        b, k = feature.shape[0], tree.k
        own = jnp.broadcast_to(jnp.eye(k, dtype=bool)[None], (b, k, k))
        scores, tokens = self._likeliest(models, context, feature, 1)
        scores, tokens = scores[:, 0], tokens[:, 0]
        pool = [(tokens, scores, jnp.zeros((b, k), jnp.int32))]
        # `index`: the frontier's indices in the pool. `seen`: its ancestors in earlier frontiers.
        index = jnp.broadcast_to(jnp.arange(k, dtype=jnp.int32)[None], (b, k))
        feature = jnp.broadcast_to(feature, (b, k, feature.shape[-1]))
        seen, before = own, None
        for depth in range(1, tree.depth):
            feature, before = self._feed(
                models, context, state, tokens, feature, depth, seen, before
            )
            gained, children = self._likeliest(models, context, feature, depth + 1)
            total = (scores[:, :, None] + gained).reshape(b, k * k)
            children = children.reshape(b, k * k)
            start = k + (depth - 1) * k * k
            pool.append((children, total, jnp.repeat(index + 1, k, axis=1)))
            scores, best = top_k(total, k)
            tokens = jnp.take_along_axis(children, best, axis=1)
            index, above = start + best, best // k
            feature = jnp.take_along_axis(feature, above[:, :, None], axis=1)
            seen = jnp.take_along_axis(seen, above[:, :, None], axis=1)
            seen = jnp.concatenate([seen, own], axis=2)
        found, total, above = (jnp.concatenate(parts, axis=1) for parts in zip(*pool, strict=True))
        return found, total, above

    def _feed(
        self,
        models: Models,
        context: Context,
        state: EagleState,
        tokens: Int[Array, "b m"],
        feature: Hidden,
        depth: int,
        mask: Bool[Array, "b m u"],
        before: KeyValue | None,
    ) -> tuple[Hidden, KeyValue]:
        """Runs the draft on nodes of one depth, given their parents' predicted states."""
        b, m = tokens.shape
        position = context.length[:, None] + jnp.full((b, m), depth - 2, jnp.int32)
        feature, block = models.draft(
            models.draft.embed(tokens, models.target),
            feature,
            position,
            mask,
            prefix=state.cache,
            lengths=context.length - 1,
            before=before,
        )
        if before is None:
            return feature, block
        return feature, jax.tree.map(lambda a, c: jnp.concatenate([a, c], axis=2), before, block)

    def _scores(
        self, models: Models, context: Context, feature: Hidden, depth: int
    ) -> Float[Array, "b m v"]:
        """Returns scores of children at `depth` over the draft's vocabulary, from their parents."""
        scores = models.draft.logits(feature, models.target)
        if self.coupled and context.noise is not None:
            noise = context.noise[:, depth - 1]
            if (ids := models.draft.tokens()) is not None:
                noise = noise[:, ids]
            noise = jnp.broadcast_to(noise[:, None, :], scores.shape)
            scores = process(scores, context.sampling)
            scores = context.sampling.choose(scores * self.confidence, scores) + noise
        return scores

    def _likeliest(
        self, models: Models, context: Context, feature: Hidden, depth: int
    ) -> tuple[Float[Array, "b m k"], Int[Array, "b m k"]]:
        """Returns the log-probabilities and the tokens of the k likeliest children of every node.

        Tokens are the target's. Log-probabilities are never positive and never NaN, as `rerank`
        requires.
        """
        assert isinstance(self.tree, DynamicTree)
        scores = self._scores(models, context, feature, depth)
        if self.coupled and context.noise is not None:
            scores = context.sampling.choose(scores * self.sharpness, scores)
        log, index = likeliest(scores, self.tree.k)
        return log, self._known(models, index)

    def _known(self, models: Models, index: Int[Array, "b m r"]) -> Int[Array, "b m r"]:
        """Returns the target's tokens for entries of the draft's vocabulary."""
        ids = models.draft.tokens()
        return index if ids is None else ids[index]
