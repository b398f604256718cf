"""Compiled programs: compiled once per `Program` and shapes, cached, and run on host arrays."""

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
    """Wall-clock seconds of one generation, by phase."""

    compile: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


# Most programs kept. On CPUs a program takes about 300 memory mappings, and Linux allows a process
# 65,530 by default.
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
    """Returns the executable of `function(program, *args)`, compiled once per program and shapes.

    `args` are the weights, then the state, whose buffers are donated (`prefill` has none), then the
    rest. This cache replaces jit's, so that compile time is measured separately and the least
    recently used programs can be dropped.
    """
    key = (function, program, _signature(args))
    with _executables_lock:
        turn = _compiling.setdefault(key, threading.Lock())
    with turn:  # threads that need the same program compile it once; others do not wait
        run = _executables.get(key)
        if run is None:
            start = time.perf_counter()
            mesh, donate, places = sharding.mesh_of(args[0].target), (), None
            if function is not prefill:
                donate = () if function is widen else (1,)  # the state is donated
                if mesh is not None:  # the new state has the placement of the old one
                    places = jax.tree.map(lambda x: x.sharding, args[1])
            # A new function for each program, so that jit's caches drop the program with it.
            bound = _on(mesh, functools.partial(function, program))
            # By default, TPUs and GPUs multiply float32 matrices with reduced precision.
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
    """Returns the name of a built-in method (the word after `--method`), else its class name."""
    words = spell(method).split()
    return words[1] if words[0] == "--method" else type(method).__name__


def _on(mesh: Mesh | None, function: Callable[..., State]) -> Callable[..., State]:
    def traced(*args: Any) -> State:
        with sharding.using(mesh), kernels.decoding():
            return function(*args)

    return traced


def check_outside_jit(params: Params, prompt: Any = None) -> None:
    """Raises ValueError if the caller is being traced by a JAX transformation.

    Decoding compiles its own programs and waits for their results, which is impossible under
    tracing.
    """
    leaves = jax.tree.leaves((params.target, prompt, jnp.zeros(())))  # under jit all are traced
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        raise ValueError(
            "params: decoding was called inside jax.jit, vmap or grad; call it outside, it "
            "compiles its own programs"
        )


def executables() -> tuple[Any, ...]:
    """Returns the cached programs, for inspection (`as_text()`, `memory_analysis()`)."""
    return tuple(_executables.values())


def forget() -> None:
    """Drop every cached program and free its memory."""
    with _executables_lock:
        _executables.clear()


def _pad(
    program: Program, prompts: list[np.ndarray], limits: list[int], seeds: list[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns the arguments of `prefill`: padded prompts, their lengths, limits and seeds."""
    length = np.array([len(prompt) for prompt in prompts], np.int32)
    size = min(bucket_prompt(int(length.max())), program.slots)  # a prompt may include an answer
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
    """Pad the prompts to a bucket, prefill them and return the state."""
    return _start(program, params, _pad(program, prompts, limits, seeds), clock)


def vacant(program: Program, params: Params, rows: int, clock: Clock) -> State:
    """Returns a state of `rows` empty rows, marked as done, for `replace_rows` to fill."""
    one = np.ones(rows, np.int32)  # every row has one token, which is its limit
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
    """Runs up to `max_rounds` rounds on the device; the buffers of `state` are donated.

    It stops earlier when `enough` rows (by default all of them) are done.
    """
    args = _bounded(program, params, state, settings, max_rounds, enough)
    run = _compiled(decode, program, args, clock)
    begin = time.perf_counter()
    state = jax.block_until_ready(run(*args))
    clock.decode += time.perf_counter() - begin
    return state


def prepare(program: Program, params: Params, state: State, settings: Sampling) -> None:
    """Compile the program that `advance` will run, without running it; `state` is not changed.

    Threads may call it concurrently to compile in parallel. Running programs concurrently over a
    mesh could deadlock, as each may wait for a device that another program holds.
    """
    _compiled(decode, program, _bounded(program, params, state, settings), Clock())


def placed(params: Params, sampling: Sampling) -> Sampling:
    """Returns `sampling` on the devices of `params`."""
    return sharding.put(sharding.mesh_of(params.target), sampling)


def _bounded(
    program: Program,
    params: Params,
    state: State,
    settings: Sampling,
    max_rounds: int = 2**31 - 1,
    enough: int | None = None,
) -> tuple[Any, ...]:
    """Returns the arguments of `decode`."""
    bounds = np.int32(max_rounds), np.int32(enough or state.done.shape[0])
    rest = sharding.put(sharding.mesh_of(params.target), (settings, *bounds))
    return program.weights(params), state, *rest


def grow(
    program: Program, params: Params, state: State, slots: int, clock: Clock
) -> tuple[Program, State]:
    """Returns program and state, with more slots (at most `slots`) if the next round needs them."""
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
    """Prefill prompts into `rows` of `state`, whose buffers are donated, and return the state."""
    arrays = (*_pad(program, prompts, limits, seeds), np.array(rows, np.int32))
    places = sharding.put(sharding.mesh_of(params.target), arrays)
    args = (program.weights(params), state, *places)
    run = _compiled(insert, program, args, clock)
    begin = time.perf_counter()
    state = jax.block_until_ready(run(*args))
    clock.prefill += time.perf_counter() - begin
    return state


def end_rows(state: State, rows: list[int]) -> State:
    """Returns `state` with these rows marked as done, so that the loop does not wait for them."""
    done = np.array(state.done)
    done[rows] = True
    # The placement stays the same, so that no new program is compiled.
    return dataclasses.replace(state, done=jax.device_put(done, state.done.sharding))


@functools.cache
def device_name() -> str:
    """Returns the kind of the first device, for reports."""
    return jax.devices()[0].device_kind
