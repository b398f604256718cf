"""EAGLE-1: drafts extrapolated from the target's features, verified as a static token tree.

A round (arXiv 2401.15077 section 4.1, figure 7):
1. catch-up: the draft reads the pairs (feature, next token) that the last round committed, with
   the target's own features, and appends their keys and values to its cache;
2. tree: level by level, each expanded node reads its parent's *predicted* feature and its own
   token; those keys and values live for this round only.
So extrapolated features never outlive a round.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from eagle_jax.decode.method import Context, Models, Prompt, Proposal, Verified
from eagle_jax.decode.sampling import argmax, perturb
from eagle_jax.decode.tree import MC_SIM_7B_63, StaticTree
from eagle_jax.models import cache as caches
from eagle_jax.models.transformer import packed_mask
from eagle_jax.types import Hidden, KeyValue, Tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EagleState:
    """Draft state between rounds.

    Attributes:
        cache: keys and values of pairs whose features are the target's own.
        features: [b, n, d] features of the tokens committed last, not yet fed to the draft.
        count: [b] how many of them are valid.
    """

    cache: KeyValue
    features: Hidden
    count: Int[Array, " b"]


@dataclasses.dataclass(frozen=True)
class Eagle:
    """EAGLE-1 with a static tree.

    Attributes:
        tree: rank paths; a chain is a tree too.
        coupled: rank children under the noise that the target will draw with, so that at
            temperature > 0 the draft follows the target's draw; without it by likelihood alone.
    """

    tree: StaticTree = MC_SIM_7B_63
    coupled: bool = True
    needs_draft: bool = dataclasses.field(default=True, init=False)

    @property
    def nodes(self) -> int:
        return self.tree.nodes

    @property
    def depth(self) -> int:
        return self.tree.depth

    def check(self, vocab_size: int) -> None:
        """Raise if the tree asks for candidates beyond the vocabulary."""
        widest = int(self.tree.ranks.max())
        if widest >= vocab_size:
            raise ValueError(f"tree rank {widest}: the vocabulary has {vocab_size} tokens")
        if self.tree.depth < 1:
            raise ValueError("tree=(): no drafted node; give at least one path")

    def init(self, models: Models, prompt: Prompt, slots: int) -> EagleState:
        """Run the draft over the prompt: pair i is (feature i, token i+1)."""
        assert models.draft is not None
        b, t = prompt.tokens.shape
        following = jnp.roll(prompt.tokens, -1, axis=1)  # the last pair is rewritten by catch-up
        positions = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32)[None], (b, t))
        mask = packed_mask(jnp.zeros((b, t), jnp.int32))
        _, block = models.draft(
            models.target.embed_tokens(following), prompt.features, positions, mask
        )
        heads, width = block[0].shape[1], block[0].shape[3]
        (empty,) = caches.empty(1, b, heads, slots, width, block[0].dtype)
        (cache,) = caches.write((empty,), (block,), jnp.zeros(b, jnp.int32))
        # Pair length-2 (the newest: its token is the root) is read by the first catch-up.
        newest = jnp.maximum(prompt.length - 2, 0)[:, None, None]
        features = jnp.take_along_axis(prompt.features, newest, axis=1, mode="clip")
        padding = jnp.zeros((b, self.depth, features.shape[-1]), features.dtype)
        count = jnp.minimum(prompt.length - 1, 1)  # a prompt of one token leaves no pair at all
        return EagleState(cache, jnp.concatenate([features, padding], axis=1), count)

    def propose(
        self, models: Models, context: Context, state: EagleState
    ) -> tuple[Proposal, EagleState]:
        feature, state = self._catch_up(models, context, state)
        tokens = self._draft(models, context, state, feature)
        return Proposal(tokens, self.tree.shape(tokens.shape[0])), state

    def update(self, state: EagleState, verified: Verified) -> EagleState:
        features = jnp.take_along_axis(
            verified.features, verified.path[:, :, None], axis=1, mode="clip"
        )
        return dataclasses.replace(state, features=features, count=verified.committed)

    def _catch_up(
        self, models: Models, context: Context, state: EagleState
    ) -> tuple[Hidden, EagleState]:
        """Feed the newly committed pairs; returns the predicted feature of the root, [b, 1, d]."""
        assert models.draft is not None
        b, n, _ = state.features.shape
        start = context.length - 1 - state.count
        step = jnp.arange(n, dtype=jnp.int32)[None]
        tokens = jnp.take_along_axis(context.tokens, start[:, None] + 1 + step, 1, mode="clip")
        output, block = models.draft(
            models.target.embed_tokens(tokens),
            state.features,
            start[:, None] + step,
            packed_mask(jnp.zeros((b, n), jnp.int32)),
            prefix=state.cache,
            lengths=start,
        )
        # Entries past `count` are garbage; the next catch-up starts right where they begin.
        (cache,) = caches.write((state.cache,), (block,), start)
        last = jnp.maximum(state.count - 1, 0)[:, None, None]
        feature = jnp.take_along_axis(output, last, axis=1, mode="clip")
        return feature, dataclasses.replace(state, cache=cache)

    def _draft(
        self,
        models: Models,
        context: Context,
        state: EagleState,
        feature: Float[Array, "b 1 d"],
    ) -> Tokens:
        """Fill the tree level by level; `feature` is the root's predicted one. Returns [b, t]."""
        assert models.draft is not None
        tree, b = self.tree, feature.shape[0]
        tokens = [context.root()[:, None]]
        expanded: list[int] = []  # nodes fed to the draft so far, in block order
        parents = np.array([0])  # nodes whose predicted feature is in `feature`, in its order
        before: KeyValue | None = None
        for depth in range(1, tree.depth + 1):
            level = np.flatnonzero(tree.depths == depth)
            row = np.searchsorted(parents, tree.parents[level])
            ranked = self._candidates(models, context, feature, depth - 1)
            tokens.append(ranked[:, row, tree.ranks[level]])
            inner = np.flatnonzero(np.isin(level, tree.parents[1:]))
            if not inner.size:
                break
            expanded += list(level[inner])
            mask = tree.ancestors[level[inner]][:, expanded]
            position = context.length[:, None] + jnp.full((1, inner.size), depth - 2, jnp.int32)
            feature, block = models.draft(
                models.target.embed_tokens(tokens[-1][:, inner]),
                feature[:, row[inner]],
                position,
                jnp.broadcast_to(jnp.asarray(mask)[None], (b, *mask.shape)),
                prefix=state.cache,
                lengths=context.length - 1,
                before=before,
            )
            before = block if before is None else _join(before, block)
            parents = level[inner]
        return jnp.concatenate(tokens, axis=1)

    def _candidates(
        self, models: Models, context: Context, feature: Hidden, depth: int
    ) -> Int[Array, "b m r"]:
        """Best children of nodes at `depth`, given their predicted features [b, m, d]."""
        scores = models.target.logits(feature)
        if self.coupled and context.noise is not None:
            scores = perturb(scores, _rows(context.noise[:, depth], scores), context.sampling)
        widest = int(self.tree.ranks[self.tree.depths == depth + 1].max()) + 1
        if widest == 1:
            return argmax(scores)[..., None]
        return jax.lax.top_k(scores, widest)[1]


def _rows(noise: Float[Array, "b v"], like: jax.Array) -> jax.Array:
    """One noise vector per row of the batch, for each of its nodes."""
    return jnp.broadcast_to(noise[:, None, :], like.shape)


def _join(first: KeyValue, second: KeyValue) -> KeyValue:
    return jax.tree.map(lambda a, c: jnp.concatenate([a, c], axis=2), first, second)
