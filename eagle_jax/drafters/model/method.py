"""Speculative sampling (arXiv 2211.17192, 2302.01318): a small model drafts a chain."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from eagle_jax.checks import check_flag
from eagle_jax.decode.acceptance import Exact, Rejection
from eagle_jax.decode.method import Context, Models, Prompt, Rule, Verified
from eagle_jax.decode.prefill import fill
from eagle_jax.decode.sampling import draft_noise, perturb
from eagle_jax.decode.top_k import argmax
from eagle_jax.decode.tree import Proposal, chain, check_levels
from eagle_jax.models import Cache
from eagle_jax.models import cache as caches
from eagle_jax.models.transformer import packed_mask
from eagle_jax.params import Params


@dataclasses.dataclass(frozen=True)
class Speculative:
    """Speculative sampling: a draft model with the target's tokenizer drafts a chain.

    Attributes:
        length: drafted tokens per round (the papers' gamma).
        coupled: whether to draw drafts with the noise that the target will draw with; otherwise the
            draft takes its likeliest token.
        rule: `Exact`, or `Rejection`, the papers' rule; drafts are then drawn with independent
            noise.
    """

    length: int = 5
    coupled: bool = True
    rule: Rule = Exact()
    draft: str = dataclasses.field(default="model", init=False)

    @property
    def nodes(self) -> int:
        return self.length + 1

    @property
    def depth(self) -> int:
        return self.length

    def check(self, params: Params) -> None:
        del params
        if not isinstance(self.length, int) or isinstance(self.length, bool) or self.length < 1:
            raise ValueError(f"length={self.length!r}: must be a whole number, at least 1")
        check_levels("length", self.length)
        check_flag("coupled", self.coupled)

    def init(self, models: Models, prompt: Prompt, slots: int) -> Cache:
        """Returns the draft's KV cache, of which rounds use the first `length - 2` entries."""

        def run(tokens, positions, mask, cache, lengths):
            return (), models.draft(tokens, positions, mask, cache=cache, lengths=lengths).block

        return fill(run, prompt.tokens, slots)[1]

    def propose(self, models: Models, context: Context, state: Cache) -> tuple[Proposal, Cache]:
        b = context.length.shape[0]
        own = None  # noise that is independent of the target's
        if isinstance(self.rule, Rejection) and not context.sampling.greedy:
            vocab = models.target.embed_tokens.embedding[...].shape[0]
            own = draft_noise(context.seeds, context.length, self.length, vocab)
        # The first step reads the last two tokens, because the cache lacks the last draft's keys
        # and values after a round that accepted every draft. Later steps read one token each.
        start = jnp.maximum(context.length - 2, 0)
        width = 2
        step = jnp.arange(width, dtype=jnp.int32)[None]
        block = jnp.take_along_axis(context.tokens, start[:, None] + step, 1, mode="clip")
        last = (context.length - 1 - start)[:, None, None]
        tokens, logits = [context.root()], []
        for depth in range(1, self.length + 1):
            output = models.draft(
                block,
                start[:, None] + jnp.arange(width, dtype=jnp.int32)[None],
                packed_mask(jnp.zeros((b, width), jnp.int32)),
                cache=state,
                lengths=start,
            )
            state = caches.write(state, output.block, start)
            features = output.features
            if width == 2:
                features = jnp.take_along_axis(features, last, axis=1, mode="clip")
            scores = models.draft.logits(features)[:, 0]
            logits.append(scores)
            if own is not None:
                scores = perturb(scores, own[:, depth - 1], context.sampling)
            elif self.coupled and context.noise is not None:
                scores = perturb(scores, context.noise[:, depth - 1], context.sampling)
            tokens.append(argmax(scores))
            block, start, width = tokens[-1][:, None], context.length - 1 + depth, 1
        drawn = None
        if own is not None:
            drawn = jnp.stack([jnp.zeros_like(logits[0]), *logits], axis=1)
        return Proposal(jnp.stack(tokens, axis=1), chain(self.length).shape(b), drawn), state

    def update(self, models: Models, state: Cache, verified: Verified) -> Cache:
        del models, verified
        return state
