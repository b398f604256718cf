"""The loop: propose -> forward -> accept -> commit, on the device until the text is finished.

The engine knows token ids only. Three compiled functions serve every method:

- `prefill` runs the target over all prompt tokens and computes no vocabulary head: the first
  token of the answer comes from the first round, whose root is the last prompt token;
- `decode` runs rounds in one `lax.while_loop`, at most `max_rounds` of them. Its state is
  resumable, so streaming and serving call the same program in chunks;
- `insert` is a prefill whose rows take the place of others (`eagle_jax.decode.batcher`).

Invariant between rounds: `length` tokens are committed, the cache holds the first `length - 1`.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int, UInt32

from eagle_jax import sharding
from eagle_jax.config import DraftConfig, TransformerConfig
from eagle_jax.decode.method import Context, Method, Models, Prompt, Verified
from eagle_jax.decode.prefill import fill
from eagle_jax.decode.sampling import Sampling, argmax, perturb, position_noise
from eagle_jax.decode.tree import Proposal
from eagle_jax.models import DRAFTS, Cache, Output, Transformer, attention, bind, kernels
from eagle_jax.models import cache as caches
from eagle_jax.params import Params
from eagle_jax.types import Logits, Tokens

# Attention reads every slot of the cache, so a few sizes are compiled, not one per length.
_PROMPT_BUCKET = 128
_SLOT_BUCKET = 256
_FINE = 1024  # from here on, the half steps between powers of two are sizes too
_GROWING = 2048  # caches that need more slots begin with fewer and grow

# Of an exact program, whatever the method: rows of a target pass, slots that a round may take.
EXACT_ROWS = 128
EXACT_DEPTH = attention.SPAN


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Everything that changes between rounds; fixed shapes, resumable.

    Attributes:
        tokens: [b, c] committed tokens, prompt included; 0 from `length` on.
        length: [b] committed tokens.
        limit: [b] length at which a row stops.
        done: [b] the row has met its limit or an end token.
        seeds: [b] of each row's noise.
        cache: the target's keys and values of the first `length - 1` tokens.
        method: the method's own state.
        rounds: [b] target passes so far, one a round.
        accepted: [b, n] rounds that committed this many drafted tokens.
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


@dataclasses.dataclass(frozen=True)
class Program:
    """Static settings of a compiled loop: the jit key.

    Attributes:
        method: the proposer.
        target, draft: architectures.
        slots: c, capacity for committed tokens and for caches.
        eos: token ids that end an answer.
        exact: every target pass has the same shape and order of summation, whatever the method.
    """

    method: Method
    target: TransformerConfig
    draft: DraftConfig | None
    slots: int
    eos: tuple[int, ...]
    exact: bool = False

    def models(self, params: Params) -> Models:
        draft = None
        if self.draft is not None:
            kind = self.draft.kind
            draft = bind(DRAFTS[kind], self.draft, params.drafts[kind].params)
        return Models(bind(Transformer, self.target, params.target), draft)


def bucket_prompt(length: int) -> int:
    """Padded prompt length: a power of two, at least 128; of long ones three quarters too."""
    size = 1 << (length - 1).bit_length()
    if size > _FINE and length <= size // 4 * 3:
        size = size // 4 * 3
    return max(_PROMPT_BUCKET, size)


def capacity(prompt_bucket: int, new_tokens: int, depth: int) -> int:
    """Slots for prompt and answer, with slack: a round writes `depth + 1` slots past the end."""
    needed = prompt_bucket + new_tokens + depth + 1
    return -(-needed // _SLOT_BUCKET) * _SLOT_BUCKET


def opening(prompt_bucket: int, slots: int, depth: int) -> int:
    """Slots to begin with where `slots` may be needed in the end: the cost of a round follows the
    text that there is, not the longest that there may be. See `grow`."""
    return min(slots, max(_GROWING, bucket_prompt(prompt_bucket + depth + 2)))


def prefill(
    program: Program,
    params: Params,
    tokens: Tokens,
    length: Int[Array, " b"],
    limit: Int[Array, " b"],
    seeds: UInt32[Array, " b"],
) -> State:
    """State before the first round: caches filled from right-padded prompts [b, t]."""
    models = program.models(params)
    b, t = tokens.shape
    read = getattr(models.draft, "features", None)  # other drafts read nothing

    def run(tokens, positions, mask, cache, lengths):
        output = models.target(tokens, positions, mask, cache=cache, lengths=lengths)
        return None if read is None else read(output), output.block

    features, cache = fill(run, tokens, program.slots)
    prompt = Prompt(tokens, length, features)
    state = State(
        tokens=jnp.pad(tokens, ((0, 0), (0, program.slots - t))),
        length=length,
        limit=limit,
        done=length >= limit,
        seeds=seeds,
        cache=cache,
        method=program.method.init(models, prompt, program.slots),
        rounds=jnp.zeros(b, jnp.int32),
        accepted=jnp.zeros((b, program.method.depth + 1), jnp.int32),
    )
    return _readable(state)


def decode(
    program: Program,
    params: Params,
    state: State,
    settings: Sampling,
    max_rounds: Int[Array, ""],
    enough: Int[Array, ""],
) -> State:
    """Rounds until `enough` rows are done or one has no room for a round, `max_rounds` at most."""
    models = program.models(params)

    def unfinished(carry: tuple[jax.Array, State]) -> jax.Array:
        count, state = carry
        more = (count < max_rounds) & (jnp.sum(state.done) < enough)
        return more & (jnp.max(state.length) + program.method.depth + 1 <= program.slots)

    def body(carry: tuple[jax.Array, State]) -> tuple[jax.Array, State]:
        count, state = carry
        return count + 1, _round(program, models, state, settings)

    return _readable(jax.lax.while_loop(unfinished, body, (jnp.int32(0), state))[1])


def one_round(program: Program, params: Params, state: State, settings: Sampling) -> State:
    """A single round, whether or not rows are done: what one turn of `decode` costs."""
    return _round(program, program.models(params), state, settings)


def _readable(state: State) -> State:
    """What the host reads, whole on every device: no process has another's rows."""
    read = ("tokens", "length", "limit", "done", "rounds", "accepted")
    return dataclasses.replace(
        state, **{name: sharding.constrain(getattr(state, name)) for name in read}
    )


def widen(program: Program, params: Params, state: State) -> State:
    """`state` of a program with fewer slots, with those of `program`; the new ones are zero."""
    rows = state.length.shape
    whole = jnp.zeros(rows, jnp.int32)
    wanted = jax.eval_shape(
        functools.partial(prefill, program), params, whole[:, None], whole, whole, state.seeds
    )

    def pad(x: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.pad(x, [(0, n - m) for m, n in zip(x.shape, like.shape, strict=True)])

    return jax.tree.map(pad, state, wanted)


def insert(
    program: Program,
    params: Params,
    state: State,
    tokens: Tokens,
    length: Int[Array, " b"],
    limit: Int[Array, " b"],
    seeds: UInt32[Array, " b"],
    rows: Int[Array, " b"],
) -> State:
    """Prefill prompts and let them take the place of `rows` of `state`.

    `state` has more rows than there are prompts (or both have one). A row that it does not have is
    nobody's place.
    """
    new = prefill(program, params, tokens, length, limit, seeds)
    many, few = state.length.shape[0], length.shape[0]

    def put(old: jax.Array, x: jax.Array) -> jax.Array:
        # Left to itself, a leaf with the rows on another axis would be broadcast silently.
        if old.shape != (many, *old.shape[1:]) or x.shape != (few, *old.shape[1:]):
            raise ValueError(
                f"method {type(program.method).__name__}: its state has a leaf {old.shape} for "
                f"{many} rows, {x.shape} for {few}; let every leaf lead with the rows"
            )
        return old.at[rows].set(x, mode="drop")

    return jax.tree.map(put, state, new)


def _round(program: Program, models: Models, state: State, settings: Sampling) -> State:
    method, n = program.method, program.method.depth + 1
    noise = None
    if not settings.greedy:
        noise = position_noise(state.seeds, state.length, n, program.target.vocab_size)
    context = Context(state.tokens, state.length, state.seeds, noise, settings, n)
    proposal, method_state = method.propose(models, context, state.method)

    depth = proposal.shape.depth
    output, logits = _verify(program, models.target, state, proposal)
    if noise is not None:
        noise = jnp.take_along_axis(noise, depth[:, :, None], axis=1, mode="clip")
    targets = argmax(perturb(logits, noise, settings))
    accepted = method.rule(proposal, logits, targets, context)

    committed, done = _clip(program, state, accepted.emitted, accepted.count + 1)
    # Rejected nodes never reach the cache: only the accepted path is written, n slots at once.
    cache = caches.commit(state.cache, output.block, accepted.path, state.length - 1)
    verified = Verified(proposal, output, logits, targets, accepted.path, committed)
    # At an end token or the limit a round may commit drafted tokens and no bonus token.
    drafted = jnp.where(state.done, -1, jnp.minimum(committed, accepted.count))
    return dataclasses.replace(
        state,
        tokens=_append(state.tokens, accepted.emitted, state.length, committed),
        length=state.length + committed,
        done=done,
        cache=cache,
        method=method.update(models, method_state, verified),
        rounds=state.rounds + (~state.done).astype(jnp.int32),
        accepted=state.accepted + (drafted[:, None] == jnp.arange(n)[None]).astype(jnp.int32),
    )


def _verify(
    program: Program, target: Transformer, state: State, proposal: Proposal
) -> tuple[Output, Logits]:
    """The target's pass over the nodes of a proposal."""
    tokens, depth, seen = proposal.tokens, proposal.shape.depth, proposal.shape.ancestors
    nodes = tokens.shape[1]
    if program.exact:  # more rows, which see only themselves
        more = (0, EXACT_ROWS - nodes)
        tokens, depth = (jnp.pad(x, ((0, 0), more)) for x in (tokens, depth))
        seen = jnp.pad(seen, ((0, 0), more, more)) | jnp.eye(EXACT_ROWS, dtype=bool)[None]
        # Barriers: no fusion with what is around the pass, which depends on the method.
        tokens, depth, seen = jax.lax.optimization_barrier((tokens, depth, seen))
    output = target(
        tokens,
        state.length[:, None] - 1 + depth,
        seen,
        cache=state.cache,
        lengths=state.length - 1,
        kernel="aligned" if program.exact else "xla",
    )
    logits = target.logits(output.features)
    if program.exact:
        output, logits = jax.lax.optimization_barrier((output, logits))
        output, logits = _first(output, nodes), logits[:, :nodes]
    return output, logits


def _first(output: Output, nodes: int) -> Output:
    return Output(
        output.features[:, :nodes],
        tuple(x[:, :nodes] for x in output.residuals),
        jax.tree.map(lambda x: x[:, :, :nodes], output.block),
    )


def _clip(
    program: Program, state: State, emitted: Int[Array, "b n"], count: Int[Array, " b"]
) -> tuple[Int[Array, " b"], Bool[Array, " b"]]:
    """Tokens to commit and whether the row is then done: stops at the first end token, included,
    and at the limit, inside the round, so that no output overshoots."""
    step = jnp.arange(emitted.shape[1])[None]
    room = state.limit - state.length
    count = jnp.minimum(count, room)
    is_eos = jnp.zeros(emitted.shape, bool)
    for token in program.eos:
        is_eos |= emitted == token
    is_eos &= step < count[:, None]
    ended = jnp.any(is_eos, axis=1)
    count = jnp.where(ended, jnp.argmax(is_eos, axis=1).astype(jnp.int32) + 1, count)
    count = jnp.where(state.done, 0, count)
    return count, state.done | ended | (count >= room)


def _append(
    tokens: Int[Array, "b c"],
    emitted: Int[Array, "b n"],
    length: Int[Array, " b"],
    count: Int[Array, " b"],
) -> Int[Array, "b c"]:
    emitted = jnp.where(jnp.arange(emitted.shape[1])[None] < count[:, None], emitted, 0)
    return caches.place(tokens, emitted, length, axis=0)


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

    `args` are parameters, then the state, which is consumed (`prefill` has none), and the rest.
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
            full = args[0].dtype == jnp.float32
            with jax.default_matmul_precision("highest" if full else "default"):
                jitted = jax.jit(bound, donate_argnums=donate, out_shardings=places)
                run = jitted.lower(*args).compile()
            clock.compile += time.perf_counter() - start
        with _executables_lock:
            _executables[key] = run
            _executables.move_to_end(key)
            _compiling.pop(key, None)
            while len(_executables) > _KEPT:
                _executables.popitem(last=False)
        return run


def _on(mesh: Mesh | None, function: Callable[..., State]) -> Callable[..., State]:
    def traced(*args: Any) -> State:
        with sharding.using(mesh), kernels.decoding():
            return function(*args)

    return traced


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
    args = (params, *sharding.put(sharding.mesh_of(params.target), arrays))
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
    """Run up to `max_rounds` rounds on the device, until `enough` rows (by default all of them)
    are done; `state` is consumed."""
    args = _bounded(params, state, settings, max_rounds, enough)
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
    _compiled(decode, program, _bounded(params, state, settings), Clock())


def _bounded(
    params: Params,
    state: State,
    settings: Sampling,
    max_rounds: int = 2**31 - 1,
    enough: int | None = None,
) -> tuple[Any, ...]:
    """What `decode` takes."""
    bounds = np.int32(max_rounds), np.int32(enough or state.done.shape[0])
    return params, state, *sharding.put(sharding.mesh_of(params.target), (settings, *bounds))


def grow(
    program: Program, params: Params, state: State, slots: int, clock: Clock
) -> tuple[Program, State]:
    """If a row has no room for a round, the program and state with more slots, at most `slots`."""
    longest, needed = int(np.max(state.length)), program.method.depth + 1
    if longest + needed <= program.slots:
        return program, state
    larger = min(slots, bucket_prompt(max(longest + needed, program.slots) + 1))
    program = dataclasses.replace(program, slots=larger)
    run = _compiled(widen, program, (params, state), clock)
    begin = time.perf_counter()
    state = jax.block_until_ready(run(params, state))
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
    args = (params, state, *sharding.put(sharding.mesh_of(params.target), arrays))
    run = _compiled(insert, program, args, clock)
    begin = time.perf_counter()
    state = jax.block_until_ready(run(*args))
    clock.prefill += time.perf_counter() - begin
    return state


@functools.cache
def device_name() -> str:
    """The first device's kind, for reports."""
    return jax.devices()[0].device_kind
