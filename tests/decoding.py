"""Pairs, methods and runs that the tests of decoding share.

One vocabulary, one batch and one cache size throughout, so that few programs are compiled.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from eagle_jax.config import TransformerConfig
from eagle_jax.decode.method import Context, Method, Models, Prompt, Proposal, Verified
from eagle_jax.decode.sampling import perturb
from eagle_jax.decode.tree import chain
from eagle_jax.models import EagleDraft, Transformer, bind
from eagle_jax.models.transformer import packed_mask
from eagle_jax.params import Params
from eagle_jax.testing import tiny_params, tiny_target

VOCAB = 11
# Lengths 1, 2 and more in one batch: rows differ on purpose.
PROMPTS = [[7], [3, 9], [1, 2, 3, 4, 5], [i * i % VOCAB for i in range(17)]]
SEEDS = [5, 6, 77, 4000000000]
NEW = 20  # with its prompt bucket of 32 and any tree here: 64 slots


def target_config() -> TransformerConfig:
    return tiny_target(VOCAB)


@functools.cache
def random_pair() -> Params:
    return tiny_params(target_config(), seed=3)


@functools.cache
def trained_pair(steps: int = 600) -> Params:
    """A pair whose draft is often right: trained for a moment on random text."""
    pair = random_pair()
    assert pair.draft is not None
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(draft, state, key):
        gradient = jax.grad(functools.partial(_distillation, pair))(draft, key)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes int32 and float
            change, state = optimizer.update(gradient, state)
        return optax.apply_updates(draft, change), state

    draft = {name: x / 4 if name.endswith("kernel") else x for name, x in pair.draft.items()}
    state = optimizer.init(draft)
    for key in jax.random.split(jax.random.key(0), steps):
        draft, state = step(draft, state, key)
    return dataclasses.replace(pair, draft=draft)


def _distillation(pair: Params, params, key: jax.Array) -> jax.Array:
    b, t = 24, 24
    tokens = jax.random.randint(key, (b, t), 0, VOCAB)
    positions = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32)[None], (b, t))
    mask = packed_mask(jnp.zeros((b, t), jnp.int32))
    target = bind(Transformer, pair.target_config, pair.target)
    features = target(tokens, positions, mask).features
    draft = bind(EagleDraft, pair.draft_config, params)
    embeddings = target.embed_tokens(tokens[:, 1:])
    guess, _ = draft(embeddings, features[:, :-1], positions[:, 1:] - 1, mask[:, 1:, 1:])
    wanted = jax.nn.softmax(target.logits(features[:, 1:]))
    got = jax.nn.log_softmax(target.logits(guess))
    return -jnp.mean(jnp.sum(wanted * got, axis=-1)) + 0.1 * jnp.mean(
        (guess - features[:, 1:]) ** 2
    )


def with_draft(pair: Params, factor: float) -> Params:
    """The pair with every draft parameter multiplied: 0 blinds it, NaN breaks it."""
    assert pair.draft is not None
    draft = {name: x * jnp.float32(factor) for name, x in pair.draft.items()}
    return dataclasses.replace(pair, draft=draft)


@dataclasses.dataclass(frozen=True)
class Clairvoyant:
    """A chain that knows the future: depth i is right or, on purpose, the least likely token.

    It runs the target over the whole text, so that how many drafts are accepted is known exactly.
    """

    right: tuple[bool, ...]
    needs_draft: bool = dataclasses.field(default=False, init=False)

    @property
    def nodes(self) -> int:
        return len(self.right) + 1

    @property
    def depth(self) -> int:
        return len(self.right)

    def init(self, models: Models, prompt: Prompt, slots: int) -> tuple[()]:
        del models, prompt, slots
        return ()

    def propose(
        self, models: Models, context: Context, state: tuple[()]
    ) -> tuple[Proposal, tuple[()]]:
        b, c = context.tokens.shape
        positions = jnp.broadcast_to(jnp.arange(c, dtype=jnp.int32)[None], (b, c))
        mask = packed_mask(jnp.zeros((b, c), jnp.int32))
        text, rows, drafted = context.tokens, jnp.arange(b), [context.root()]
        for i, right in enumerate(self.right):
            features = models.target(text, positions, mask).features
            logits = models.target.logits(features)[rows, context.length - 1 + i]
            noise = None if context.noise is None else context.noise[:, i]
            best = perturb(logits, noise, context.sampling)
            token = jnp.argmax(best, axis=-1) if right else jnp.argmin(best, axis=-1)
            drafted.append(token.astype(jnp.int32))
            text = text.at[rows, context.length + i].set(drafted[-1])
        return Proposal(jnp.stack(drafted, axis=1), chain(self.depth).shape(b)), state

    def update(self, state: tuple[()], verified: Verified) -> tuple[()]:
        del verified
        return state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Recorded:
    inner: object
    tokens: Int[Array, "b t"]


@dataclasses.dataclass(frozen=True)
class Recording:
    """Any method; its state also holds the tree proposed last."""

    inner: Method

    @property
    def nodes(self) -> int:
        return self.inner.nodes

    @property
    def depth(self) -> int:
        return self.inner.depth

    @property
    def needs_draft(self) -> bool:
        return self.inner.needs_draft

    def init(self, models: Models, prompt: Prompt, slots: int) -> Recorded:
        tokens = jnp.zeros((prompt.tokens.shape[0], self.nodes), jnp.int32)
        return Recorded(self.inner.init(models, prompt, slots), tokens)

    def propose(
        self, models: Models, context: Context, state: Recorded
    ) -> tuple[Proposal, Recorded]:
        proposal, inner = self.inner.propose(models, context, state.inner)
        return proposal, Recorded(inner, proposal.tokens)

    def update(self, state: Recorded, verified: Verified) -> Recorded:
        return dataclasses.replace(state, inner=self.inner.update(state.inner, verified))


def lists(rows) -> list[list[int]]:
    """Rows of token ids as plain lists, which compare by `==`."""
    return [np.asarray(row).tolist() for row in rows]
