"""Rounds of the engine's own loop on a prepared state: no prompt, caches of noise."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
from shapes import draw
from tqdm import tqdm

from eagle_jax.config import TransformerConfig
from eagle_jax.decode import engine
from eagle_jax.decode.method import Method
from eagle_jax.decode.sampling import sampling
from eagle_jax.models import Cache
from eagle_jax.params import Params


def _noise(like: Any, seed: int = 0) -> jax.Array:
    """Of a leaf's shape: noise for floats, zeros for numbers of tokens, indices and the like."""
    if jnp.issubdtype(like.dtype, jnp.floating):
        return draw(jax.random.key(seed), like.shape, 0.0, 1.0, like.dtype)
    return jnp.zeros(like.shape, like.dtype)


@dataclasses.dataclass
class Slots:
    """The target's cache, full of noise; all jobs of a size take it in turn, one is room enough."""

    config: TransformerConfig
    slots: int
    batch: int = 1
    cache: Cache | None = None

    def new(self) -> Cache:
        """Another one."""
        config = self.config
        shape = (self.batch, config.num_key_value_heads, self.slots, config.head_dim)
        like = jax.ShapeDtypeStruct(shape, common.default_dtype())
        pairs = range(config.num_hidden_layers)
        return tuple((_noise(like, 2 * i), _noise(like, 2 * i + 1)) for i in pairs)

    def take(self) -> Cache:
        """The cache, to be given back: the engine's loop consumes what it is given."""
        cache, self.cache = self.cache, None
        return self.new() if cache is None else cache

    def give(self, cache: Cache) -> None:
        """Puts back what became of the cache."""
        self.cache = cache

    @property
    def nbytes(self) -> int:
        config = self.config
        row = (
            config.num_key_value_heads * config.head_dim * np.dtype(common.default_dtype()).itemsize
        )
        return 2 * config.num_hidden_layers * self.batch * self.slots * row


class Rounds:
    """Rounds of a method in the engine's own loop, again and again from the same length.

    No prompt is read: `used` tokens count as committed (on average over rounds that commit `pace`
    each), caches are noise. What is accepted says nothing; a round's cost does not depend on it.
    Every call has seeds of its own.

    Attributes:
        tau: committed tokens per round of the last call.
    """

    def __init__(
        self,
        params: Params,
        method: Method,
        place: Slots,
        used: int,
        rounds: int = 32,
        temperature: float = 0.0,
        pace: float = 1.0,
    ) -> None:
        config = None if method.draft is None else params.drafts[method.draft].config
        self.place, self.rounds, self.tau, self.calls = place, rounds, 0.0, 0
        self.program = engine.Program(method, params.target_config, config, place.slots, ())
        self.params, self.settings = params.only(method.draft), sampling(temperature)
        span = round(pace * rounds)
        self.start = used - span // 2
        self.limit = place.slots - method.depth - 1
        if self.start < 2 or used + span >= self.limit:
            raise ValueError(
                f"--used {used}: {place.slots} slots hold 2 + {span // 2} to "
                f"{self.limit - span - 1} tokens with {rounds} rounds; change --cache or --used"
            )
        b = place.batch
        row = jax.ShapeDtypeStruct((b,), jnp.int32)
        shapes = jax.eval_shape(
            functools.partial(engine.prefill, self.program),
            self.params,
            jax.ShapeDtypeStruct((b, 2), jnp.int32),
            row,
            row,
            jax.ShapeDtypeStruct((b,), jnp.uint32),
        )
        vocab = params.target_config.vocab_size
        tokens = jax.random.randint(jax.random.key(0), (b, place.slots), 0, vocab, jnp.int32)
        blank = jax.tree.map(_noise, dataclasses.replace(shapes, cache=()))
        self.state = dataclasses.replace(blank, tokens=tokens)

    def warm(self) -> None:
        """Compiles; on a cache of its own, so that several may at a time."""
        self._advance(self.place.new(), 0)

    def __call__(self) -> float:
        """Milliseconds of a round."""
        seconds, state = self._advance(self.place.take(), self.rounds)
        self.place.give(state.cache)
        rounds = np.asarray(state.rounds)
        self.tau = float(np.sum(np.asarray(state.length) - self.start) / rounds.sum())
        return 1e3 * seconds / int(rounds.max())  # a row at the end of the cache is done sooner

    def _advance(self, cache: Cache, rounds: int) -> tuple[float, engine.State]:
        b, clock = self.place.batch, engine.Clock()
        seeds = self.calls * b + jnp.arange(b, dtype=jnp.uint32)
        self.calls += 1
        state = dataclasses.replace(
            self.state,
            length=jnp.full(b, self.start, jnp.int32),
            limit=jnp.full(b, self.limit, jnp.int32),
            done=jnp.zeros(b, bool),
            seeds=seeds,
            rounds=jnp.zeros(b, jnp.int32),
            accepted=jnp.zeros_like(self.state.accepted),
            cache=cache,
        )
        state = engine.advance(self.program, self.params, state, self.settings, clock, rounds)
        self.state = dataclasses.replace(state, cache=())
        return clock.decode, state


def compile_all(jobs: Sequence[Any], place: Slots, threads: int) -> None:
    """Calls `warm` of every job, as many at a time as have room for a cache each."""
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        free = stats["bytes_limit"] - stats["bytes_in_use"]
        threads = max(1, min(threads, int(free / (2 * place.nbytes))))
    with ThreadPoolExecutor(threads) as pool:
        waiting = pool.map(lambda job: job.warm(), jobs)
        list(tqdm(waiting, "compiling", len(jobs), file=sys.stderr))
