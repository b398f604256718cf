"""Acceptance rules, which decide which path of a verified tree is committed.

`Exact` works with every method: it follows the target's own tokens through the tree. The other two
are published rules, for comparison. `Rejection` keeps the target's distribution, but a seed gives
another text than vanilla decoding. `Typical` keeps neither.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from eagle_jax.decode.method import Accepted, Context
from eagle_jax.decode.sampling import position_uniform, process
from eagle_jax.decode.top_k import argmax
from eagle_jax.decode.tree import Proposal
from eagle_jax.types import Logits


@dataclasses.dataclass(frozen=True)
class Exact:
    """Accepts the path from the root along which every node has the target's own token.

    It is lossless for every proposal: the token emitted after a node is always the target's own
    (greedy, or drawn with that position's noise), and the draft only decides how many tokens one
    pass yields. Its answers have the same distribution as with the multi-round rule of EAGLE and
    SpecInfer with point-mass drafts.
    """

    lossless: ClassVar[bool] = True
    seeded: ClassVar[bool] = True

    def __call__(
        self, proposal: Proposal, logits: Logits, targets: Int[Array, "b t"], context: Context
    ) -> Accepted:
        del logits
        above = jnp.take_along_axis(targets, proposal.shape.parents, 1, mode="clip")
        return walk(proposal, proposal.tokens == above, targets, context.longest)


@dataclasses.dataclass(frozen=True)
class Typical:
    """Medusa's typical acceptance (section 2.3.1), which is LOSSY.

    Answers do not follow the target's distribution. A drafted token is kept if its probability is
    above min(epsilon, delta * exp(-entropy)). Among the paths of kept tokens the longest is
    accepted, and among equally long ones the likeliest. Greedy decoding equals `Exact`.

    Attributes:
        epsilon: the fixed threshold.
        delta: the factor of the entropy-dependent threshold.
    """

    epsilon: float = 0.09
    delta: float = 0.3

    lossless: ClassVar[bool] = False
    seeded: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < 1:
            raise ValueError(f"epsilon={self.epsilon}: must be a probability, above 0 and below 1")
        if not 0 < self.delta < float("inf"):
            raise ValueError(f"delta={self.delta}: must be a number above 0")

    def __call__(
        self, proposal: Proposal, logits: Logits, targets: Int[Array, "b t"], context: Context
    ) -> Accepted:
        exact = Exact()(proposal, logits, targets, context)
        if context.sampling.greedy:
            return exact
        law = jax.nn.log_softmax(logits, axis=-1)
        mass = jnp.exp(law)
        entropy = -jnp.sum(jnp.where(mass > 0, mass * law, 0.0), axis=-1)
        threshold = jnp.minimum(self.epsilon, self.delta * jnp.exp(-entropy))

        def of_parent(values: Array) -> Array:
            return jnp.take_along_axis(values, proposal.shape.parents, 1, mode="clip")

        rows = jnp.take_along_axis(law, proposal.shape.parents[:, :, None], 1, mode="clip")
        own = jnp.take_along_axis(rows, proposal.tokens[:, :, None], 2, mode="clip")[..., 0]
        kept = jnp.exp(own) > of_parent(threshold)
        # `where` instead of a product with the mask: 0 * -inf of an excluded token would be NaN.
        own = own.at[:, 0].set(0.0)
        likelihood = jnp.sum(jnp.where(proposal.shape.ancestors, own[:, None, :], 0.0), axis=-1)
        accepted = walk(proposal, kept, targets, context.longest, likelihood)
        # Accepted drafts may differ from the target's tokens, so the drafts themselves are emitted.
        drafted = jnp.take_along_axis(proposal.tokens, accepted.path, 1, mode="clip")
        step = jnp.arange(accepted.path.shape[1])[None]
        emitted = jnp.where(
            step < accepted.count[:, None], jnp.roll(drafted, -1, axis=1), accepted.emitted
        )
        accepted = dataclasses.replace(accepted, emitted=emitted)
        return context.sampling.choose(accepted, exact)


@dataclasses.dataclass(frozen=True)
class Rejection:
    """The rule of speculative sampling (arXiv 2211.17192) for a chain drawn from `proposal.logits`.

    A token is kept with probability min(1, p / q). At the first token that is rejected, the bonus
    token is drawn from the normalised max(0, p - q) instead. Answers have the target's
    distribution, but a seed gives another text than vanilla decoding. The draft must use noise
    that is independent of the target's. Greedy decoding equals `Exact`.
    """

    lossless: ClassVar[bool] = True
    seeded: ClassVar[bool] = False

    def __call__(
        self, proposal: Proposal, logits: Logits, targets: Int[Array, "b t"], context: Context
    ) -> Accepted:
        exact = Exact()(proposal, logits, targets, context)
        if context.sampling.greedy:
            return exact
        assert proposal.logits is not None and context.noise is not None
        t = proposal.tokens.shape[1]
        p = jax.nn.softmax(logits, axis=-1)[:, :-1]
        q = jax.nn.softmax(process(proposal.logits, context.sampling), axis=-1)[:, 1:]
        drawn = proposal.tokens[:, 1:, None]
        ratio = _pick(p, drawn) / jnp.maximum(_pick(q, drawn), jnp.finfo(q.dtype).tiny)
        kept = position_uniform(context.seeds, context.length, t - 1) < ratio
        count = jnp.sum(jnp.cumprod(kept.astype(jnp.int32), axis=1), axis=1)
        residual = jnp.maximum(p - q, 0.0)
        # If rounding leaves no residual, p equals q, and p takes its place.
        residual = jnp.where(jnp.sum(residual, axis=-1, keepdims=True) > 0, residual, p)
        redrawn = argmax(jnp.log(residual) + context.noise[:, : t - 1])
        bonus = jnp.concatenate([redrawn, targets[:, -1:]], axis=1)
        step = jnp.arange(t, dtype=jnp.int32)[None]
        drafted = jnp.roll(proposal.tokens, -1, axis=1)
        accepted = Accepted(
            path=jnp.where(step <= count[:, None], step, 0),
            count=count,
            emitted=jnp.where(step < count[:, None], drafted, bonus),
        )
        return context.sampling.choose(accepted, exact)


def _pick(values: Float[Array, "b t v"], index: Int[Array, "b t 1"]) -> Float[Array, "b t"]:
    return jnp.take_along_axis(values, index, axis=2, mode="clip")[..., 0]


def walk(
    proposal: Proposal,
    kept: Bool[Array, "b t"],
    targets: Int[Array, "b t"],
    longest: int,
    preference: Float[Array, "b t"] | None = None,
) -> Accepted:
    """Returns the deepest path from the root whose nodes are all kept.

    Args:
        proposal: the trees.
        kept: whether each node passes the rule by itself; the root's entry is not read.
        targets: the target's token after each node.
        longest: n, nodes on the longest path, including the root.
        preference: decides between equally deep nodes (the largest value wins); without it, the
            lowest index wins.
    """

    def one_row(kept, depth, ancestors, targets, preference):
        alive = jnp.all(kept.at[0].set(True)[None, :] | ~ancestors, axis=1)
        # Siblings may have the same token; the lowest index then wins, so the path is unique.
        reached = jnp.where(alive, depth, -1)
        if preference is not None:
            preference = jnp.where(reached == jnp.max(reached), preference, -jnp.inf)
        best = jnp.argmax(reached if preference is None else preference)
        on_path = ancestors[best][None, :] & (depth[None, :] == jnp.arange(longest)[:, None])
        path = jnp.argmax(on_path, axis=1).astype(jnp.int32)
        return path, depth[best], targets[path]

    shape = proposal.shape
    return Accepted(*jax.vmap(one_row)(kept, shape.depth, shape.ancestors, targets, preference))
