"""The parts of a compiled loop: its static settings, its state, and the sizes of its buffers."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Bool, Float, Int, UInt32

from eagle_jax.config import DraftConfig, TransformerConfig
from eagle_jax.decode.method import Method, Models
from eagle_jax.drafters import registry
from eagle_jax.layout import PLAIN, Layout
from eagle_jax.models import Cache, Transformer, attention, bind
from eagle_jax.params import Params
from eagle_jax.types import ParamDict

# Lengths are rounded up to a few sizes, since every size is compiled separately and attention reads
# every slot of the cache.
_PROMPT_BUCKET = 128
_SLOT_BUCKET = 256
_FINE = 1024  # above this, three quarters of each power of two are prompt sizes too
_GROWING = 2048  # larger caches start with fewer slots and grow

# In an exact program, for every method: nodes per target pass, and slots that a round may use.
EXACT_ROWS = 128
EXACT_DEPTH = attention.SPAN


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Logprobs:
    """Log-probabilities of committed tokens, from the target's raw logits before any setting.

    Attributes:
        chosen: [b, c] log-probability of each committed token; meaningless for the prompt.
        ids: [b, c, m] the likeliest tokens at each position, best first.
        top: [b, c, m] their log-probabilities.
    """

    chosen: Float[Array, "b c"]
    ids: Int[Array, "b c m"]
    top: Float[Array, "b c m"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Everything that changes between rounds; its shapes are fixed and it can be resumed.

    Attributes:
        tokens: [b, c] committed tokens, prompt included; 0 from `length` on.
        length: [b] number of committed tokens.
        limit: [b] length at which a row stops.
        done: [b] whether the row has reached its limit or an end token.
        seeds: [b] seed of each row's noise.
        cache: the target's KV cache of the first `length - 1` tokens.
        method: the method's own state.
        rounds: [b] target passes so far, one per round.
        accepted: [b, n] entry i counts the rounds that committed i drafted tokens.
        drafted: [b, c] whether a committed token was a draft that the target accepted; False for
            bonus tokens and for the prompt.
        logprobs: log-probabilities of the committed tokens; None unless the program reports them.
    """

    tokens: Int[Array, "b c"]
    length: Int[Array, " b"]
    limit: Int[Array, " b"]
    done: Bool[Array, " b"]
    seeds: UInt32[Array, " b"]
    cache: Cache
    method: Any
    rounds: Int[Array, " b"]
    accepted: Int[Array, "b n"]
    drafted: Bool[Array, "b c"]
    logprobs: Logprobs | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    """The parameters that a compiled program reads.

    Attributes:
        target: parameters of the target, by name.
        draft: parameters of the method's draft, by name; empty if the method has none.
    """

    target: ParamDict
    draft: ParamDict


@dataclasses.dataclass(frozen=True)
class Program:
    """The static settings of a compiled loop, which identify it in the cache of programs.

    Attributes:
        method: the decoding method.
        target, draft: the architectures; `draft` is None if the method has none.
        slots: c, capacity for committed tokens and for caches.
        exact: whether every target pass has the same shape and order of summation, for all methods.
        logprobs: alternatives per token whose log-probabilities are reported; None reports none.
        target_layout, draft_layout: how the weights of each lie in memory.
    """

    method: Method
    target: TransformerConfig
    draft: DraftConfig | None
    slots: int
    exact: bool = False
    logprobs: int | None = None
    target_layout: Layout = PLAIN
    draft_layout: Layout = PLAIN

    @classmethod
    def of(
        cls,
        params: Params,
        method: Method,
        slots: int,
        exact: bool = False,
        logprobs: int | None = None,
    ) -> Program:
        """Returns the program of a method for the models of `params` and their memory layouts."""
        draft = None if method.draft is None else params.drafts[method.draft]
        return cls(
            method,
            params.target_config,
            None if draft is None else draft.config,
            slots,
            exact,
            logprobs,
            params.layout,
            PLAIN if draft is None else draft.layout,
        )

    def weights(self, params: Params) -> Weights:
        """Returns the arrays of `params` that this program reads."""
        kind = None if self.draft is None else self.draft.kind
        return Weights(params.target, {} if kind is None else params.drafts[kind].params)

    def models(self, weights: Weights) -> Models:
        """Returns the modules that hold `weights`; call it inside a compiled function."""
        draft = None
        if self.draft is not None:
            module = registry.by_config(self.draft).module_class()
            draft = bind(module, self.draft, weights.draft, self.draft_layout)
        return Models(bind(Transformer, self.target, weights.target, self.target_layout), draft)


def bucket_prompt(length: int) -> int:
    """Returns the padded length of a prompt.

    It is a power of two, at least 128, or three quarters of a power of two above 1024.
    """
    size = 1 << (length - 1).bit_length()
    if size > _FINE and length <= size // 4 * 3:
        size = size // 4 * 3
    return max(_PROMPT_BUCKET, size)


def capacity(prompt_bucket: int, new_tokens: int, depth: int) -> int:
    """Returns the slots for prompt, answer and the `depth + 1` slots that a round writes beyond."""
    needed = prompt_bucket + new_tokens + depth + 1
    return -(-needed // _SLOT_BUCKET) * _SLOT_BUCKET


def opening(prompt_bucket: int, slots: int, depth: int) -> int:
    """Returns the number of cache slots to start with, given the `slots` of the longest answer.

    The cost of a round then grows with the text so far. See `executables.grow`.
    """
    return min(slots, max(_GROWING, bucket_prompt(prompt_bucket + depth + 2)))
