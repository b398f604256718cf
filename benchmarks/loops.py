"""Runs rounds of the engine's own loop on a prepared state: no prompt, caches of noise."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding
from shapes import draw
from tqdm import tqdm

from eagle_jax import sharding
from eagle_jax.config import TransformerConfig
from eagle_jax.decode import engine
from eagle_jax.decode.executables import Clock, advance, prepare
from eagle_jax.decode.method import Method
from eagle_jax.decode.program import Program, State
from eagle_jax.decode.sampling import Sampling, SamplingParams, Vocabulary
from eagle_jax.decode.top_k import argmax
from eagle_jax.decode.tree import StaticTree
from eagle_jax.models import Cache, Transformer, bind, kernels
from eagle_jax.models import cache as caches
from eagle_jax.params import Params


def _place(mesh: Mesh | None, like: Any) -> Sharding | None:
    """Returns the sharding that the engine uses for such a leaf of its state.

    Keys and values, the only floats with four axes, are split over heads; the rest is replicated.
    """
    if mesh is None:
        return None
    cached = len(like.shape) == 4 and jnp.issubdtype(like.dtype, jnp.floating)
    return sharding.placed(mesh, like.shape, *(caches.AXES if cached else ()))


def _noise(mesh: Mesh | None, like: Any, seed: int = 0) -> jax.Array:
    """Returns an array like a leaf: noise for floats, zeros for integers (lengths, indices)."""
    place = _place(mesh, like)
    if jnp.issubdtype(like.dtype, jnp.floating):
        return draw(jax.random.key(seed), like.shape, 0.0, 1.0, like.dtype, place)
    return jnp.zeros(like.shape, like.dtype, device=place)


@dataclasses.dataclass
class Slots:
    """The target's KV cache, full of noise, which all jobs of a size share to save memory."""

    config: TransformerConfig
    slots: int
    batch: int = 1
    mesh: Mesh | None = None
    cache: Cache | None = None

    @property
    def _like(self) -> jax.ShapeDtypeStruct:
        config = self.config
        shape = (self.batch, config.num_key_value_heads, self.slots, config.head_dim)
        return jax.ShapeDtypeStruct(shape, common.default_dtype())

    def new(self) -> Cache:
        """Returns a new cache."""
        noise = functools.partial(_noise, self.mesh, self._like)
        return tuple((noise(2 * i), noise(2 * i + 1)) for i in range(self.config.num_hidden_layers))

    def look(self) -> Cache:
        """Returns the cache for reading; the caller must not donate it."""
        if self.cache is None:
            self.cache = self.new()
        return self.cache

    def take(self) -> Cache:
        """Returns the cache for the engine's loop, which donates it; `give` takes the result."""
        cache, self.cache = self.look(), None
        return cache

    def give(self, cache: Cache) -> None:
        """Stores the cache that the loop returned."""
        self.cache = cache

    @property
    def nbytes(self) -> int:
        """Returns the bytes of one device's part of the cache."""
        like, place = self._like, _place(self.mesh, self._like)
        shape = like.shape if place is None else place.shard_shape(like.shape)
        return 2 * self.config.num_hidden_layers * math.prod(shape) * like.dtype.itemsize


class Rounds:
    """A job that runs rounds of a method in the engine's own loop; every call starts at one length.

    No prompt is read and caches contain noise: `used` tokens count as committed (on average over
    the rounds, if each commits `pace` tokens). Acceptance is meaningless, but a round's cost does
    not depend on it. Every call uses new seeds.

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
        self.place, self.rounds, self.tau, self.calls = place, rounds, 0.0, 0
        self.program = Program.of(params, method, place.slots)
        rows = [SamplingParams(temperature=temperature)] * place.batch
        self.settings = Sampling.of(rows, Vocabulary(params.target_config.vocab_size))
        self.params = params.with_draft(method.draft)
        span = round(pace * rounds)
        self.start = used - span // 2
        self.limit = place.slots - method.depth - 1
        if self.start < 2 or used + span >= self.limit:
            raise ValueError(
                f"--used {used}: {place.slots} slots hold 2 + {span // 2} to "
                f"{self.limit - span - 1} tokens with {rounds} rounds; change --cache or --used"
            )
        b = place.batch
        kinds = ((b, 2), jnp.int32), ((b,), jnp.int32), ((b,), jnp.int32), ((b,), jnp.uint32)
        arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in kinds]
        prefill = functools.partial(engine.prefill, self.program)
        shapes = jax.eval_shape(prefill, self.program.weights(params), *arrays)
        vocab = params.target_config.vocab_size
        tokens = jax.random.randint(jax.random.key(0), (b, place.slots), 0, vocab, jnp.int32)
        noise = functools.partial(_noise, place.mesh)
        blank = jax.tree.map(noise, dataclasses.replace(shapes, cache=()))
        self.state = dataclasses.replace(blank, tokens=sharding.put(place.mesh, tokens))

    def warm(self) -> None:
        """Compiles."""
        prepare(self.program, self.params, self._begun(self.place.look()), self.settings)

    def __call__(self) -> float:
        """Runs the rounds and returns the milliseconds of one."""
        clock, state = Clock(), self._begun(self.place.take())
        self.calls += 1
        state = advance(self.program, self.params, state, self.settings, clock, self.rounds)
        self.place.give(state.cache)
        self.state = dataclasses.replace(state, cache=())
        rounds = np.asarray(state.rounds)
        self.tau = float(np.sum(np.asarray(state.length) - self.start) / rounds.sum())
        # A row that reaches the end of the cache stops earlier.
        return 1e3 * clock.decode / int(rounds.max())

    def _begun(self, cache: Cache) -> State:
        b = self.place.batch
        fresh = {
            "length": np.full(b, self.start, np.int32),
            "limit": np.full(b, self.limit, np.int32),
            "done": np.zeros(b, bool),
            "seeds": self.calls * b + np.arange(b, dtype=np.uint32),
            "rounds": np.zeros(b, np.int32),
            "accepted": np.zeros(self.state.accepted.shape, np.int32),
        }
        return dataclasses.replace(self.state, cache=cache, **sharding.put(self.place.mesh, fresh))


class Passes:
    """A job that runs the target's pass over a fixed tree, its head and argmax; no commit."""

    def __init__(
        self, params: Params, tree: StaticTree, place: Slots, used: int, rounds: int
    ) -> None:
        self.params, self.place, self.rounds = params.target, place, rounds
        start = np.full(place.batch, used - rounds // 2, np.int32)
        tokens = np.zeros((place.batch, tree.nodes), np.int32)
        self.args = sharding.put(place.mesh, (tokens, start, np.int32(rounds)))
        shape, config, layout = tree.shape(place.batch), params.target_config, params.layout

        @jax.jit
        def loop(
            params: Any, cache: Any, tokens: jax.Array, length: jax.Array, count: jax.Array
        ) -> jax.Array:
            target = bind(Transformer, config, params, layout)

            def body(_: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                tokens, length = carry
                places = length[:, None] - 1 + shape.depth
                output = target(tokens, places, shape.ancestors, cache=cache, lengths=length - 1)
                return argmax(target.logits(output.features)), length + 1

            with sharding.using(place.mesh), kernels.decoding():  # like the engine's programs
                return jax.lax.fori_loop(0, count, body, (tokens, length))[0]

        self.loop: Any = loop

    def warm(self) -> None:
        """Compiles."""
        self.loop = self.loop.lower(self.params, self.place.look(), *self.args).compile()

    def __call__(self) -> float:
        """Runs the passes and returns the milliseconds of one."""
        cache = self.place.look()
        begin = time.perf_counter()
        jax.block_until_ready(self.loop(self.params, cache, *self.args))
        return 1e3 * (time.perf_counter() - begin) / self.rounds


def compile_all(jobs: Sequence[Any], place: Slots, threads: int) -> None:
    """Compiles all jobs (`warm`) in `threads` threads while the cache is allocated; runs none."""
    place.look()
    with ThreadPoolExecutor(threads) as pool:
        waiting = pool.map(lambda job: job.warm(), jobs)
        list(tqdm(waiting, "compiling", len(jobs), file=sys.stderr))
