"""Pairs, methods and runs that the tests of decoding share.

One vocabulary, one batch and one cache size throughout, so that few programs are compiled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from jaxtyping import Array, Int
from tokenizers import decoders, models

from eagle_jax.config import EagleConfig, TransformerConfig
from eagle_jax.decode import (
    DynamicTree,
    Eagle,
    EagleLookup,
    Lookahead,
    Medusa,
    PromptLookup,
    Recycling,
    Speculative,
    Vanilla,
)
from eagle_jax.decode.acceptance import Exact
from eagle_jax.decode.method import Context, Method, Models, Prompt, Rule, Verified
from eagle_jax.decode.sampling import Sampling, SamplingParams, Vocabulary, perturb
from eagle_jax.decode.tree import Proposal, chain, static_tree
from eagle_jax.drafters.eagle.module import EagleDraft
from eagle_jax.models import Transformer, bind
from eagle_jax.models.transformer import packed_mask
from eagle_jax.params import Draft, Params
from eagle_jax.testing import tiny_params, tiny_target
from eagle_jax.text import Tokenizer

VOCAB = 11
# Lengths 1, 2 and more in one batch: rows differ on purpose.
PROMPTS = [[7], [3, 9], [1, 2, 3, 4, 5], [i * i % VOCAB for i in range(17)]]
SEEDS = [5, 6, 77, 4000000000]
LETTERS = "abcdefghijk"  # one per id
NEW = 20  # with its prompt bucket of 32 and any tree here: 64 slots


_GAPS = static_tree([[2], [2, 1], [1], [2, 1, 3], [1, 0]])
_SMALL = static_tree([[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0]])
# Every method, with trees that have gaps and siblings.
METHODS: dict[str, Method] = {
    "vanilla": Vanilla(),
    "eagle chain": Eagle(chain(3)),
    "eagle gaps": Eagle(_GAPS, coupled=False),
    "eagle2": Eagle(DynamicTree(depth=4, k=3, drafted=12)),
    "eagle2 plain": Eagle(DynamicTree(depth=3, k=4, drafted=36), coupled=False),
    "eagle3": Eagle(DynamicTree(depth=4, k=3, drafted=9), head="eagle3"),
    "eagle3 static": Eagle(_SMALL, head="eagle3"),
    "eagle lookup": EagleLookup(
        Eagle(_SMALL), PromptLookup(max_ngram=4, min_ngram=1, length=5, latest=True, truncate=True)
    ),
    "medusa": Medusa(_SMALL),
    "medusa plain": Medusa(_GAPS, coupled=False),
    "speculative": Speculative(3),
    "speculative plain": Speculative(1, coupled=False),
    "lookahead": Lookahead(ngram=4, window=3, guesses=3),
    "lookahead plain": Lookahead(ngram=3, window=4, guesses=2, prompt_pool=False, coupled=False),
    "prompt lookup": PromptLookup(length=4),
    "recycling": Recycling(_SMALL, width=3),
}


def target_config() -> TransformerConfig:
    return tiny_target(VOCAB)


def sampling(
    temperature: float = 0.0, *args, rows: int = 4, prompts=None, vocab=VOCAB, **fields
) -> Sampling:
    """Settings that `rows` rows share as arrays; `args` are top-k and top-p."""
    fields |= dict(zip(("top_k", "top_p"), args, strict=False))
    return arrays([SamplingParams(temperature=temperature, **fields)] * rows, prompts, vocab)


def arrays(rows: Sequence[SamplingParams], prompts=None, vocab: int = VOCAB) -> Sampling:
    """Settings of every row as arrays; `prompts` are the rows' prompt lengths."""
    vocabulary = Vocabulary(vocab)
    return Sampling.of([vocabulary.resolve(row) for row in rows], vocabulary, prompts)


@functools.cache
def random_pair() -> Params:
    return tiny_params(target_config(), seed=3)


@functools.cache
def trained_pair(steps: int = 600) -> Params:
    """A pair whose draft is often right: trained for a moment on random text."""
    pair = random_pair()
    untrained = pair.drafts["eagle"]
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(draft, state, key):
        gradient = jax.grad(functools.partial(_distillation, pair))(draft, key)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes int32 and float
            change, state = optimizer.update(gradient, state)
        return optax.apply_updates(draft, change), state

    draft = {name: x / 4 if name.endswith("kernel") else x for name, x in untrained.params.items()}
    state = optimizer.init(draft)
    for key in jax.random.split(jax.random.key(0), steps):
        draft, state = step(draft, state, key)
    drafts = {**pair.drafts, "eagle": Draft(draft, untrained.config)}
    return dataclasses.replace(pair, drafts=drafts)


@functools.cache
def lettered_pair() -> Params:
    """The trained pair with a tokenizer of eleven letters, of which k (id 10) ends an answer."""
    words = {letter: i for i, letter in enumerate(LETTERS)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["k"])
    text = Tokenizer(tokenizer.to_str(), {"eos_token": "k"})
    assert text.eos_ids == (10,) and text.encode("cab") == [2, 0, 1]
    return dataclasses.replace(trained_pair(), tokenizer=text)


def _distillation(pair: Params, params, key: jax.Array) -> jax.Array:
    b, t = 24, 24
    tokens = jax.random.randint(key, (b, t), 0, VOCAB)
    positions = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32)[None], (b, t))
    mask = packed_mask(jnp.zeros((b, t), jnp.int32))
    target = bind(Transformer, pair.target_config, pair.target)
    features = target(tokens, positions, mask).features
    draft = bind(EagleDraft, pair.drafts["eagle"].config, params)
    embeddings = target.embed_tokens(tokens[:, 1:])
    guess, _ = draft(embeddings, features[:, :-1], positions[:, 1:] - 1, mask[:, 1:, 1:])
    wanted = jax.nn.softmax(target.logits(features[:, 1:]))
    got = jax.nn.log_softmax(target.logits(guess))
    return -jnp.mean(jnp.sum(wanted * got, axis=-1)) + 0.1 * jnp.mean(
        (guess - features[:, 1:]) ** 2
    )


def with_draft(pair: Params, factor: float) -> Params:
    """The pair with every draft parameter multiplied: 0 blinds it, NaN breaks it."""

    def scaled(draft: Draft) -> Draft:
        params = {
            name: x * jnp.float32(factor) if x.dtype == jnp.float32 else x
            for name, x in draft.params.items()
        }
        return Draft(params, draft.config)

    drafts = {kind: scaled(draft) for kind, draft in pair.drafts.items()}
    return dataclasses.replace(pair, drafts=drafts)


def with_vocabulary(pair: Params, tokens: Sequence[int]) -> Params:
    """The pair whose EAGLE-1 draft proposes these tokens only."""
    chosen, draft = jnp.array(tokens, jnp.int32), pair.drafts["eagle"]
    assert isinstance(draft.config, EagleConfig)
    head = {
        "lm_head.kernel": pair.target["lm_head.kernel"][:, chosen],
        "d2t": chosen - jnp.arange(len(tokens), dtype=jnp.int32),
    }
    config = dataclasses.replace(draft.config, draft_vocab_size=len(tokens))
    drafts = {**pair.drafts, "eagle": Draft({**draft.params, **head}, config)}
    return dataclasses.replace(pair, drafts=drafts)


@dataclasses.dataclass(frozen=True)
class Clairvoyant:
    """A chain that knows the future: depth i is right or, on purpose, the least likely token.

    It runs the target over the whole text, so that how many drafts are accepted is known exactly.
    """

    right: tuple[bool, ...]
    draft: None = dataclasses.field(default=None, init=False)
    rule: Rule = dataclasses.field(default=Exact(), init=False)

    def check(self, params: Params) -> None:
        del params

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

    def update(self, models: Models, state: tuple[()], verified: Verified) -> tuple[()]:
        del models, verified
        return state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Recorded:
    inner: object
    tokens: Int[Array, "b t"]
    parents: Int[Array, "b t"]


@dataclasses.dataclass(frozen=True)
class Recording:
    """Any method; its state also holds the tokens and parents of the tree proposed last."""

    inner: Method

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

    def init(self, models: Models, prompt: Prompt, slots: int) -> Recorded:
        tokens = jnp.zeros((prompt.tokens.shape[0], self.nodes), jnp.int32)
        return Recorded(self.inner.init(models, prompt, slots), tokens, tokens)

    def propose(
        self, models: Models, context: Context, state: Recorded
    ) -> tuple[Proposal, Recorded]:
        proposal, inner = self.inner.propose(models, context, state.inner)
        return proposal, Recorded(inner, proposal.tokens, proposal.shape.parents)

    def update(self, models: Models, state: Recorded, verified: Verified) -> Recorded:
        return dataclasses.replace(state, inner=self.inner.update(models, state.inner, verified))


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Counts what XLA compiles (or fetches from the compilation cache), helpers included."""
    seen: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        del duration_secs, kwargs
        seen.extend([event] * (event == "/jax/core/compile/backend_compile_duration"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def lists(rows) -> list[list[int]]:
    """Rows of token ids as plain lists, which compare by `==`."""
    return [np.asarray(row).tolist() for row in rows]
