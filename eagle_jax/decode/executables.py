"""Compiled programs: made once per program and shapes, kept, and run on padded host arrays."""

from __future__ import annotations

import collections
import dataclasses
import functools
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from eagle_jax import progress, sharding
from eagle_jax.decode.engine import decode, insert, prefill, widen
from eagle_jax.decode.method import Method
from eagle_jax.decode.method_cli import spell
from eagle_jax.decode.program import Program, State, bucket_prompt
from eagle_jax.decode.sampling import Sampling
from eagle_jax.models import kernels
from eagle_jax.params import Params


@dataclasses.dataclass
class Clock:
    """Seconds of one generation, compilation apart."""

    compile: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


# On CPUs a program takes 300 memory mappings, of 65,530 that Linux grants a process by default.
_KEPT = 160
_executables: collections.OrderedDict[Any, Callable[..., State]] = collections.OrderedDict()
_executables_lock = threading.Lock()
_compiling: dict[Any, threading.Lock] = {}


def _signature(tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((leaf.shape, leaf.dtype, _placement(leaf)) for leaf in leaves)


def _placement(leaf: Any) -> Any:
    return leaf.sharding if isinstance(leaf, jax.Array) else None


def _compiled(
    function: Callable[..., State], program: Program, args: tuple[Any, ...], clock: Clock
) -> Callable[..., State]:
    """The executable of `function(program, *args)`; compiled once per program and shapes.

    `args` are the weights, then the state, which is consumed (`prefill` has none), and the rest.
    Kept by hand instead of by jit so that compile time is known exactly and apart, and so that
    those not used for longest can go.
    """
    key = (function, program, _signature(args))
    with _executables_lock:
        turn = _compiling.setdefault(key, threading.Lock())
    with turn:  # two threads with one new shape compile it once; other shapes don't wait
        run = _executables.get(key)
        if run is None:
            start = time.perf_counter()
            mesh, donate, places = sharding.mesh_of(args[0].target), (), None
            if function is not prefill:
                donate = () if function is widen else (1,)  # the state is consumed
                if mesh is not None:  # and what takes its place lies where it lay
                    places = jax.tree.map(lambda x: x.sharding, args[1])
            # A function of its own, so that jit's caches let go of the program with it.
            bound = _on(mesh, functools.partial(function, program))
            # TPUs and GPUs multiply float32 in fewer bits unless told otherwise.
            full = args[0].target["embed_tokens.embedding"].dtype == jnp.float32
            with jax.default_matmul_precision("highest" if full else "default"):
                jitted = jax.jit(bound, donate_argnums=donate, out_shardings=places)
                lowered = jitted.lower(*args)
                with progress.compiling(lambda: f"{_name(program.method)} {function.__name__}"):
                    run = lowered.compile()
            clock.compile += time.perf_counter() - start
        with _executables_lock:
            _executables[key] = run
            _executables.move_to_end(key)
            _compiling.pop(key, None)
            while len(_executables) > _KEPT:
                _executables.popitem(last=False)
        return run


def _name(method: Method) -> str:
    """The word after `--method` of a built-in method, else its class."""
    words = spell(method).split()
    return words[1] if words[0] == "--method" else type(method).__name__


def _on(mesh: Mesh | None, function: Callable[..., State]) -> Callable[..., State]:
    def traced(*args: Any) -> State:
        with sharding.using(mesh), kernels.decoding():
            return function(*args)

    return traced


def check_outside_jit(params: Params, prompt: Any = None) -> None:
    """Raises ValueError where a JAX transformation traces the caller.

    Decoding compiles its own programs and waits for their results, which tracing cannot.
    """
    leaves = jax.tree.leaves((params.target, prompt, jnp.zeros(())))  # under jit all are traced
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        raise ValueError(
            "params: decoding was called inside jax.jit, vmap or grad; call it outside, it "
            "compiles its own programs"
        )


def executables() -> tuple[Any, ...]:
    """The compiled programs there are, for inspection (`as_text()`, `memory_analysis()`)."""
    return tuple(_executables.values())


def forget() -> None:
    """Drop every compiled program and its memory."""
    with _executables_lock:
        _executables.clear()


def _pad(
    program: Program, prompts: list[np.ndarray], limits: list[int], seeds: list[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What `prefill` takes: prompts padded to a bucket, their lengths, limits and seeds."""
    length = np.array([len(prompt) for prompt in prompts], np.int32)
    size = min(bucket_prompt(int(length.max())), program.slots)  # an answer may be among them
    tokens = np.zeros((len(prompts), size), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, length, np.array(limits, np.int32), np.array(seeds, np.uint32)


def start(
    program: Program,
    params: Params,
    prompts: list[np.ndarray],
    limits: list[int],
    seeds: list[int],
    clock: Clock,
) -> State:
    """Pad the prompts to a bucket and prefill."""
    return _start(program, params, _pad(program, prompts, limits, seeds), clock)


def vacant(program: Program, params: Params, rows: int, clock: Clock) -> State:
    """`rows` rows that are done: places for `replace_rows`."""
    one = np.ones(rows, np.int32)  # a token each, at its limit
    arrays = (np.zeros((rows, 1), np.int32), one, one, np.zeros(rows, np.uint32))
    return _start(program, params, arrays, clock)


def _start(program: Program, params: Params, arrays: tuple[np.ndarray, ...], clock: Clock) -> State:
    args = (program.weights(params), *sharding.put(sharding.mesh_of(params.target), arrays))
    run = _compiled(prefill, program, args, clock)
    begin = time.perf_counter()
    state = jax.block_until_ready(run(*args))
    clock.prefill += time.perf_counter() - begin
    return state


def advance(
    program: Program,
    params: Params,
    state: State,
    settings: Sampling,
    clock: Clock,
    max_rounds: int = 2**31 - 1,
    enough: int | None = None,
) -> State:
    """Runs up to `max_rounds` rounds on the device, and consumes `state`.

    It ends earlier when `enough` rows (by default all of them) are done.
    """
    args = _bounded(program, params, state, settings, max_rounds, enough)
    run = _compiled(decode, program, args, clock)
    begin = time.perf_counter()
    state = jax.block_until_ready(run(*args))
    clock.decode += time.perf_counter() - begin
    return state


def prepare(program: Program, params: Params, state: State, settings: Sampling) -> None:
    """Compile what `advance` will run; `state` is only looked at.

    For threads that compile at a time: over a mesh, programs must not be run at a time, or each
    may wait for a device that another has.
    """
    _compiled(decode, program, _bounded(program, params, state, settings), Clock())


def placed(params: Params, sampling: Sampling) -> Sampling:
    """`sampling` on the devices of `params`."""
    return sharding.put(sharding.mesh_of(params.target), sampling)


def _bounded(
    program: Program,
    params: Params,
    state: State,
    settings: Sampling,
    max_rounds: int = 2**31 - 1,
    enough: int | None = None,
) -> tuple[Any, ...]:
    """The arguments of `decode`."""
    bounds = np.int32(max_rounds), np.int32(enough or state.done.shape[0])
    rest = sharding.put(sharding.mesh_of(params.target), (settings, *bounds))
    return program.weights(params), state, *rest


def grow(
    program: Program, params: Params, state: State, slots: int, clock: Clock
) -> tuple[Program, State]:
    """If a row has no room for a round, the program and state with more slots, at most `slots`."""
    longest, needed = int(np.max(state.length)), program.method.depth + 1
    if longest + needed <= program.slots:
        return program, state
    larger = min(slots, bucket_prompt(max(longest + needed, program.slots) + 1))
    program = dataclasses.replace(program, slots=larger)
    args = program.weights(params), state
    run = _compiled(widen, program, args, clock)
    begin = time.perf_counter()
    state = jax.block_until_ready(run(*args))
    clock.decode += time.perf_counter() - begin
    return program, state


def replace_rows(
    program: Program,
    params: Params,
    state: State,
    rows: list[int],
    prompts: list[np.ndarray],
    limits: list[int],
    seeds: list[int],
    clock: Clock,
) -> State:
    """Start prompts in the place of `rows`; `state` is consumed."""
    arrays = (*_pad(program, prompts, limits, seeds), np.array(rows, np.int32))
    places = sharding.put(sharding.mesh_of(params.target), arrays)
    args = (program.weights(params), state, *places)
    run = _compiled(insert, program, args, clock)
    begin = time.perf_counter()
    state = jax.block_until_ready(run(*args))
    clock.prefill += time.perf_counter() - begin
    return state


def end_rows(state: State, rows: list[int]) -> State:
    """`state` with these rows done, so that the loop no longer waits for them."""
    done = np.array(state.done)
    done[rows] = True
    # Placed as it was, so that the same program goes on.
    return dataclasses.replace(state, done=jax.device_put(done, state.done.sharding))


@functools.cache
def device_name() -> str:
    """The first device's kind, for reports."""
    return jax.devices()[0].device_kind
