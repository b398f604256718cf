"""The decoding loop: propose -> verify -> accept -> commit, on the device until all rows are done.

The engine works on token ids only. Three compiled functions serve every method:

- `prefill` runs the target over all prompt tokens without the vocabulary head: the first token
  of the answer comes from the first round, whose root is the last prompt token;
- `decode` runs at most `max_rounds` rounds in one `lax.while_loop`. Its state is resumable, so
  streaming and serving call the same program in chunks;
- `insert` prefills prompts into rows of a running batch (`eagle_jax.decode.batching.batcher`).

Invariant between rounds: `length` tokens are committed; the KV cache holds the first `length - 1`.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt32

from eagle_jax import sharding
from eagle_jax.decode.method import Accepted, Context, Models, Prompt, Verified
from eagle_jax.decode.prefill import fill
from eagle_jax.decode.program import EXACT_ROWS, Logprobs, Program, State, Weights
from eagle_jax.decode.sampling import Path, Sampling
from eagle_jax.decode.top_k import argmax, top_k
from eagle_jax.decode.tree import Proposal
from eagle_jax.models import Output, Transformer
from eagle_jax.models import cache as caches
from eagle_jax.types import Logits, Tokens


def prefill(
    program: Program,
    weights: Weights,
    tokens: Tokens,
    length: Int[Array, " b"],
    limit: Int[Array, " b"],
    seeds: UInt32[Array, " b"],
) -> State:
    """Returns the state before the first round, with caches filled from padded prompts [b, t]."""
    models = program.models(weights)
    b, t = tokens.shape
    read = getattr(models.draft, "features", None)  # absent if the draft reads no features

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
        drafted=jnp.zeros((b, program.slots), bool),
        logprobs=_no_logprobs(program, b),
    )
    return _readable(state)


def _no_logprobs(program: Program, rows: int) -> Logprobs | None:
    if program.logprobs is None:
        return None
    shape = rows, program.slots, program.logprobs
    return Logprobs(
        jnp.zeros(shape[:2], jnp.float32),
        jnp.zeros(shape, jnp.int32),
        jnp.zeros(shape, jnp.float32),
    )


def decode(
    program: Program,
    weights: Weights,
    state: State,
    settings: Sampling,
    max_rounds: Int[Array, ""],
    enough: Int[Array, ""],
) -> State:
    """Runs up to `max_rounds` rounds; stops if `enough` rows are done or a row's cache is full."""
    models = program.models(weights)

    def unfinished(carry: tuple[jax.Array, State]) -> jax.Array:
        count, state = carry
        more = (count < max_rounds) & (jnp.sum(state.done) < enough)
        return more & (jnp.max(state.length) + program.method.depth + 1 <= program.slots)

    def body(carry: tuple[jax.Array, State]) -> tuple[jax.Array, State]:
        count, state = carry
        return count + 1, _round(program, models, state, settings)

    return _readable(jax.lax.while_loop(unfinished, body, (jnp.int32(0), state))[1])


def one_round(program: Program, weights: Weights, state: State, settings: Sampling) -> State:
    """Runs a single round, even if all rows are done, to measure the cost of one in `decode`."""
    return _round(program, program.models(weights), state, settings)


def _readable(state: State) -> State:
    """Replicates the fields that the host reads; a process sees only the data of its devices."""
    read = ("tokens", "length", "limit", "done", "rounds", "accepted", "drafted", "logprobs")
    return dataclasses.replace(
        state, **{name: sharding.constrain(getattr(state, name)) for name in read}
    )


def widen(program: Program, weights: Weights, state: State) -> State:
    """Returns `state` with all its buffers zero-padded to the slots of `program`."""
    rows = state.length.shape
    whole = jnp.zeros(rows, jnp.int32)
    wanted = jax.eval_shape(
        functools.partial(prefill, program), weights, whole[:, None], whole, whole, state.seeds
    )

    def pad(x: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.pad(x, [(0, n - m) for m, n in zip(x.shape, like.shape, strict=True)])

    return jax.tree.map(pad, state, wanted)


def insert(
    program: Program,
    weights: Weights,
    state: State,
    tokens: Tokens,
    length: Int[Array, " b"],
    limit: Int[Array, " b"],
    seeds: UInt32[Array, " b"],
    rows: Int[Array, " b"],
) -> State:
    """Prefill prompts and put their states into `rows` of `state`.

    `state` must have more rows than there are prompts, or both must have one. Out-of-range entries
    of `rows` are ignored.
    """
    new = prefill(program, weights, tokens, length, limit, seeds)
    many, few = state.length.shape[0], length.shape[0]

    def put(old: jax.Array, x: jax.Array) -> jax.Array:
        # Without this check, a leaf whose first axis is not the rows could be broadcast silently.
        if old.shape != (many, *old.shape[1:]) or x.shape != (few, *old.shape[1:]):
            raise ValueError(
                f"method {type(program.method).__name__}: its state has a leaf {old.shape} for "
                f"{many} rows, {x.shape} for {few}; let every leaf lead with the rows"
            )
        return old.at[rows].set(x, mode="drop")

    return jax.tree.map(put, state, new)


def _round(program: Program, models: Models, state: State, settings: Sampling) -> State:
    method, n = program.method, program.method.depth + 1
    noise = settings.noise(state.seeds, state.length, n, program.target.vocab_size)
    context = Context(state.tokens, state.length, state.seeds, noise, settings, n)
    proposal, method_state = method.propose(models, context, state.method)

    depth = proposal.shape.depth
    output, logits = _verify(program, models.target, state, proposal)
    if noise is not None:
        noise = jnp.take_along_axis(noise, depth[:, :, None], axis=1, mode="clip")
    path = Path(state.tokens, state.length, settings.prompt, proposal.tokens, proposal.shape, n)
    processed = settings.process(logits, path)
    targets = argmax(processed if noise is None else processed + noise)
    accepted = method.rule(proposal, processed, targets, context)

    committed, done = _clip(settings, state, accepted.emitted, accepted.count + 1)
    # Rejected nodes never reach the cache: only the accepted path is written, n slots at once.
    cache = caches.commit(state.cache, output.block, accepted.path, state.length - 1)
    verified = Verified(proposal, output, logits, targets, accepted.path, committed)
    # A round that reaches an end token or the limit may commit no bonus token.
    drafted = jnp.where(state.done, -1, jnp.minimum(committed, accepted.count))
    step, marks = jnp.arange(n)[None], state.drafted
    if n > 1:  # vanilla decoding drafts nothing, so it writes no marks
        marks = caches.place(marks, step < drafted[:, None], state.length, axis=0)
    return dataclasses.replace(
        state,
        tokens=_append(state.tokens, accepted.emitted, state.length, committed),
        length=state.length + committed,
        done=done,
        cache=cache,
        method=method.update(models, method_state, verified),
        rounds=state.rounds + (~state.done).astype(jnp.int32),
        accepted=state.accepted + (drafted[:, None] == step).astype(jnp.int32),
        drafted=marks,
        logprobs=_report(state, logits, accepted),
    )


def _report(state: State, logits: Logits, accepted: Accepted) -> Logprobs | None:
    """Returns the state's log-probabilities, updated with those of the emitted tokens."""
    if state.logprobs is None:
        return None
    rows = jnp.take_along_axis(logits, accepted.path[:, :, None], axis=1, mode="clip")
    law = jax.nn.log_softmax(rows.astype(jnp.float32), axis=-1)
    chosen = jnp.take_along_axis(law, accepted.emitted[:, :, None], axis=2, mode="clip")[..., 0]
    most = state.logprobs.ids.shape[-1]
    if most:
        top, ids = top_k(law, min(most, law.shape[-1]))
        missing = ((0, 0), (0, 0), (0, most - ids.shape[-1]))
        top, ids = jnp.pad(top, missing, constant_values=-jnp.inf), jnp.pad(ids, missing)
    else:
        top, ids = law[..., :0], jnp.zeros((*law.shape[:2], 0), jnp.int32)
    return jax.tree.map(
        lambda old, new: caches.place(old, new, state.length, axis=0),
        state.logprobs,
        Logprobs(chosen, ids, top),
    )


def _verify(
    program: Program, target: Transformer, state: State, proposal: Proposal
) -> tuple[Output, Logits]:
    """Runs the target over the nodes of a proposal and returns its output and logits."""
    tokens, depth, seen = proposal.tokens, proposal.shape.depth, proposal.shape.ancestors
    nodes = tokens.shape[1]
    if program.exact:  # pad to a fixed number of nodes; padding attends only to itself
        more = (0, EXACT_ROWS - nodes)
        tokens, depth = (jnp.pad(x, ((0, 0), more)) for x in (tokens, depth))
        seen = jnp.pad(seen, ((0, 0), more, more)) | jnp.eye(EXACT_ROWS, dtype=bool)[None]
        # The barriers prevent fusion with the code around the pass, which depends on the method.
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
    settings: Sampling, state: State, emitted: Int[Array, "b n"], count: Int[Array, " b"]
) -> tuple[Int[Array, " b"], Bool[Array, " b"]]:
    """Returns how many tokens to commit, and whether the row is then done.

    A row stops after its first end token or at its limit. Both are checked within the round, so
    no answer is longer than it should be.
    """
    step = jnp.arange(emitted.shape[1])[None]
    room = state.limit - state.length
    count = jnp.minimum(count, room)
    is_eos = jnp.any(emitted[:, :, None] == settings.ends[:, None], axis=2)
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
