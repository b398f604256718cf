"""Decoding: `generate` and `stream`, every method through the one engine.

params = eagle_jax.load("tiny")
out = eagle_jax.decode.generate(params, "What is a prime number?", method="eagle")
print(out.text, out.statistics.tau)
"""

from __future__ import annotations

import dataclasses
import json
import operator
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from eagle_jax.decode import engine, tuned
from eagle_jax.decode.accept import Exact, Rejection, Typical
from eagle_jax.decode.method import Method
from eagle_jax.decode.methods.eagle import Eagle
from eagle_jax.decode.methods.eagle_lookup import EagleLookup
from eagle_jax.decode.methods.lookahead import Lookahead
from eagle_jax.decode.methods.medusa import Medusa
from eagle_jax.decode.methods.prompt_lookup import PromptLookup
from eagle_jax.decode.methods.recycling import Recycling
from eagle_jax.decode.methods.speculative import Speculative
from eagle_jax.decode.methods.vanilla import Vanilla
from eagle_jax.decode.named import AUTO, METHODS, default_tree, spell, unknown
from eagle_jax.decode.sampling import Sampling, sampling
from eagle_jax.decode.tree import (
    MOST_NODES,
    DynamicTree,
    StaticTree,
    best_tree,
    chain,
    named_tree,
    static_tree,
)
from eagle_jax.params import Params
from eagle_jax.text import StreamDecoder, Tokenizer

__all__ = [
    "METHODS",
    "DynamicTree",
    "Eagle",
    "EagleLookup",
    "Exact",
    "Generation",
    "Lookahead",
    "Medusa",
    "PromptLookup",
    "Recycling",
    "Rejection",
    "Speculative",
    "StaticTree",
    "Statistics",
    "Typical",
    "Vanilla",
    "best_tree",
    "chain",
    "default_tree",
    "generate",
    "named_tree",
    "static_tree",
    "stream",
]

# A draft that gets hardly a token accepted in so many rounds is hardly one for this target.
_FIRST_ROUNDS = 32
_HARDLY = 1.05

Prompt = (
    str
    | Sequence[str]
    | Sequence[int]
    | Sequence[Mapping[str, str]]
    | Sequence[Sequence[int]]
    | Sequence[Sequence[Mapping[str, str]]]
    | np.ndarray
    | jax.Array
)


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What a generation did and what it cost.

    Attributes:
        new_tokens: committed tokens, per row; an end token counts.
        rounds: target passes over a tree, per row (the prompt's pass is not one).
        tau: mean acceptance length over all rows: committed tokens per round, the bonus token of
            every round included, so vanilla's is 1.
        accepted_per_depth: share of rounds that committed a drafted token at depth 1, 2, ...
        compile_seconds, prefill_seconds, decode_seconds: wall clock, apart from each other.
        tokens_per_second: committed tokens of all rows over `decode_seconds`.
        device: what it ran on.
        method: what decoded, as options of `python -m eagle_jax.decode`.
    """

    new_tokens: tuple[int, ...]
    rounds: tuple[int, ...]
    tau: float
    accepted_per_depth: tuple[float, ...]
    compile_seconds: float
    prefill_seconds: float
    decode_seconds: float
    tokens_per_second: float
    device: str
    method: str

    def json(self) -> str:
        """One line of JSON."""
        return json.dumps(dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class Generation:
    """The answer to one prompt, or to a batch.

    Attributes:
        text: decoded answer without special tokens; a list for a batch; none without tokenizer.
        tokens: ids of the answer, its end token included; a list of arrays for a batch.
        statistics: of the whole call.
    """

    text: Any
    tokens: Any
    statistics: Statistics


def generate(
    params: Params,
    prompt: Prompt,
    *,
    method: str | Method = "eagle",
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | Sequence[int] = 0,
    raw: bool = False,
    ignore_eos: bool = False,
    exact: bool = False,
) -> Generation:
    """Decode answers to one prompt or to a batch.

    Args:
        params: from `eagle_jax.load`.
        prompt: a string (a user's message, if the tokenizer has a chat template), a chat (list of
            `{"role", "content"}`), token ids, or a list of any of these: a batch.
        method: a name of `METHODS`, an instance such as `Eagle(tree=chain(5))`, or "auto": what
            `python -m eagle_jax.tune` found the fastest for this model on this machine; the
            statistics say which.
        max_new_tokens: longest answer; the model's context may end it sooner.
        temperature: 0 is greedy.
        top_k, top_p: filters of the sampled distribution; 0 and 1 switch them off.
        seed: of the sampling noise: a list with one per row, or one number, row i of a batch then
            takes seed + i. In float32 a row's text depends on its prompt and seed alone, not on the
            method nor on its neighbours.
        raw: take strings as they are, without the chat template.
        ignore_eos: decode on to `max_new_tokens` (for measurements).
        exact: in bfloat16 too, give every method the very same text for the same batch of prompts
            (but for rules that keep the law only, or are lossy). Otherwise passes over more and
            fewer tokens round differently there, and a near-tie may fall either way. Every pass,
            vanilla's as well, then has 128 nodes and one order of summation: slower, for checks.

    Returns:
        Text, token ids and statistics.

    Raises:
        ValueError: a bad argument, an empty prompt, or one that does not fit the context.
    """
    session = _Session(
        params,
        prompt,
        Options(method, max_new_tokens, temperature, top_k, top_p, ignore_eos, exact),
        seed,
        raw,
    )
    while not session.finished():
        session.advance()
    session.warn()
    return session.result()


def stream(
    params: Params,
    prompt: Prompt,
    *,
    rounds_per_chunk: int = 4,
    method: str | Method = "eagle",
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | Sequence[int] = 0,
    raw: bool = False,
    ignore_eos: bool = False,
    exact: bool = False,
) -> Iterator[Generation]:
    """Decode one prompt, yielding what is new as it comes; the same program as `generate`.

    Args:
        rounds_per_chunk: rounds on the device between two yields.
        params, prompt, method, max_new_tokens, temperature, top_k, top_p, seed, raw, ignore_eos,
            exact: as in `generate`.

    Yields:
        Generations whose `text` and `tokens` are the newly committed part, and whose `statistics`
        cover everything so far. Joined, they are exactly what `generate` returns.

    Raises:
        ValueError: as `generate`; a batch.
    """
    if not isinstance(rounds_per_chunk, int) or rounds_per_chunk < 1:
        raise ValueError(f"rounds_per_chunk={rounds_per_chunk!r}: must be a whole number above 0")
    session = _Session(
        params,
        prompt,
        Options(method, max_new_tokens, temperature, top_k, top_p, ignore_eos, exact),
        seed,
        raw,
    )
    if session.batched:
        raise ValueError("prompt: stream takes one prompt; use generate for a batch")
    return _stream(session, rounds_per_chunk)


def _stream(session: _Session, rounds_per_chunk: int) -> Iterator[Generation]:
    tokenizer = session.params.tokenizer
    decoder = StreamDecoder(tokenizer) if tokenizer is not None else None
    seen = 0
    while not session.finished():
        session.advance(rounds_per_chunk)
        session.warn()
        tokens = session.answers()[0]
        new, seen = tokens[seen:], len(tokens)
        text = None
        if decoder is not None:
            text = decoder.feed(new.tolist()) + (decoder.flush() if session.finished() else "")
        yield Generation(text, new, session.statistics())


@dataclasses.dataclass(frozen=True)
class Options:
    """What all rows of a call share; meanings and defaults as in `generate`."""

    method: str | Method = "eagle"
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    ignore_eos: bool = False
    exact: bool = False

    def check(self, params: Params, rows: int = 1) -> tuple[Sampling, Method]:
        """Sampling settings and the method for `rows` rows; a ValueError names what cannot be."""
        settings = sampling(self.temperature, self.top_k, self.top_p)
        new = self.max_new_tokens
        if not isinstance(new, int | np.integer) or isinstance(new, bool) or new < 1:
            raise ValueError(f"max_new_tokens={new!r}: must be a whole number above 0")
        method = self.method
        if isinstance(method, str) and method == AUTO:
            method = tuned.method(params, rows, self.temperature)
        method = _method(method, params)
        if not isinstance(self.exact, bool):
            raise ValueError(f"exact={self.exact!r}: must be True or False")
        rows, depth = engine.EXACT_ROWS, engine.EXACT_DEPTH - 1
        if self.exact and (method.nodes > rows or method.depth > depth):
            raise ValueError(
                f"exact=True: passes have {rows} nodes to depth {depth}, and method "
                f"{type(method).__name__} {method.nodes} to depth {method.depth}; use smaller "
                "settings"
            )
        return settings, method

    def program(self, params: Params, method: Method, longest: int) -> engine.Program:
        """What decodes prompts of up to `longest` tokens."""
        context = params.target_config.max_position_embeddings
        new = min(int(self.max_new_tokens), context)  # no row grows past the context
        depth = engine.EXACT_DEPTH if self.exact else method.depth
        return engine.Program(
            method,
            params.target_config,
            None if method.draft is None else params.drafts[method.draft].config,
            engine.capacity(engine.bucket_prompt(longest), new, depth),
            () if self.ignore_eos or params.tokenizer is None else params.tokenizer.eos_ids,
            self.exact,
        )


class _Session:
    """One generation: checked arguments, the engine's state, and what to report of it."""

    def __init__(
        self,
        params: Params,
        prompt: Prompt,
        options: Options,
        seed: int | Sequence[int],
        raw: bool,
    ) -> None:
        self.params = params
        self.prompts, self.batched = _encode(params, prompt, raw)
        self.settings, self.method = options.check(params, len(self.prompts))
        context = params.target_config.max_position_embeddings
        limits = [min(len(p) + options.max_new_tokens, context) for p in self.prompts]
        longest = max(map(len, self.prompts))
        self.program = options.program(params, self.method, longest)
        self.slots = self.program.slots
        if not options.exact:  # caches would grow at other lengths for another method
            slots = engine.opening(engine.bucket_prompt(longest), self.slots, self.method.depth)
            self.program = dataclasses.replace(self.program, slots=slots)
        self.params = params.only(self.method.draft)
        self.warned = False
        self.clock = engine.Clock()
        seeds = check_seeds(seed, len(self.prompts))
        self.state = engine.start(
            self.program, self.params, self.prompts, limits, seeds, self.clock
        )

    def warn(self) -> None:
        """Warns of a draft that seems to be for another target; at most once per generation."""
        if self.method.draft is None or self.warned:
            return
        statistics = self.statistics()
        rounds = sum(statistics.rounds)
        self.warned = rounds >= _FIRST_ROUNDS
        if self.warned and statistics.tau < _HARDLY:
            warnings.warn(
                f"acceptance length {statistics.tau:.2f} over {rounds} rounds (1 is none): is the "
                f"{self.method.draft!r} draft one for this target? "
                "python -m eagle_jax.convert --inspect DRAFT tells what it is",
                stacklevel=3,
            )

    def advance(self, max_rounds: int = 2**31 - 1) -> None:
        """At most `max_rounds`; fewer where the cache has to grow."""
        self.program, self.state = engine.grow(
            self.program, self.params, self.state, self.slots, self.clock
        )
        self.state = engine.advance(
            self.program, self.params, self.state, self.settings, self.clock, max_rounds
        )

    def finished(self) -> bool:
        return bool(np.all(np.asarray(self.state.done)))

    def answers(self) -> list[np.ndarray]:
        tokens, length = jax.device_get((self.state.tokens, self.state.length))
        return [
            row[len(prompt) : end]
            for row, prompt, end in zip(tokens, self.prompts, length, strict=True)
        ]

    def statistics(self) -> Statistics:
        length, rounds, accepted = jax.device_get(
            (self.state.length, self.state.rounds, self.state.accepted)
        )
        new = [int(end) - len(prompt) for end, prompt in zip(length, self.prompts, strict=True)]
        total = max(int(rounds.sum()), 1)
        reached = accepted.sum(axis=0)[::-1].cumsum()[::-1][1:]
        return Statistics(
            new_tokens=tuple(new),
            rounds=tuple(int(r) for r in rounds),
            tau=sum(new) / total,
            accepted_per_depth=tuple(float(r) / total for r in reached),
            compile_seconds=self.clock.compile,
            prefill_seconds=self.clock.prefill,
            decode_seconds=self.clock.decode,
            tokens_per_second=sum(new) / max(self.clock.decode, 1e-9),
            device=engine.device_name(),
            method=spell(self.method),
        )

    def result(self) -> Generation:
        tokens, tokenizer = self.answers(), self.params.tokenizer
        texts = None if tokenizer is None else [tokenizer.decode(t.tolist()) for t in tokens]
        if self.batched:
            return Generation(texts, tokens, self.statistics())
        return Generation(None if texts is None else texts[0], tokens[0], self.statistics())


def _method(method: str | Method, params: Params) -> Method:
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(unknown(method))
        method = METHODS[method]()
    if isinstance(method, type) or not isinstance(method, Method):
        raise ValueError(f"method={method!r}: give a name ({', '.join(METHODS)}) or an instance")
    if method.draft is not None and method.draft not in params.drafts:
        raise ValueError(
            f"method {type(method).__name__}: needs a draft of kind {method.draft!r}, and params "
            f"has {', '.join(sorted(params.drafts)) or 'none'}; load one with draft=DIR"
        )
    if max(method.nodes, method.depth + 1) > MOST_NODES:
        raise ValueError(
            f"method {type(method).__name__}: {method.nodes} nodes to depth {method.depth}; a "
            f"round takes at most {MOST_NODES} either way, use smaller settings"
        )
    method.check(params)
    return method


def check_seeds(seed: int | Sequence[int], rows: int) -> list[int]:
    """One checked seed per row."""
    try:
        if np.ndim(seed) == 0:
            seeds = [operator.index(seed) + row for row in range(rows)]  # type: ignore[arg-type]
        else:
            seeds = [operator.index(value) for value in seed]  # type: ignore[union-attr]
    except TypeError as error:
        raise ValueError(f"seed={seed!r}: give a whole number, or one per row") from error
    if len(seeds) != rows:
        raise ValueError(f"seed={seeds}: {len(seeds)} seeds for {rows} rows; give one per row")
    for value in seeds:
        if not 0 <= value < 2**32:
            raise ValueError(f"seed={value}: must be at least 0 and below 2**32")
    return seeds


def _encode(params: Params, prompt: Prompt, raw: bool) -> tuple[list[np.ndarray], bool]:
    """Token ids of every row, and whether a batch was given."""
    batched = _is_batch(prompt)
    rows = list(prompt) if batched else [prompt]
    if not rows:
        raise ValueError("prompt=[]: empty batch; give at least one prompt")
    return [encode(params, row, raw) for row in rows], batched


def _is_batch(prompt: Any) -> bool:
    if isinstance(prompt, str):
        return False
    if isinstance(prompt, np.ndarray | jax.Array):
        return prompt.ndim > 1
    if not isinstance(prompt, Sequence):
        return False
    first = next(iter(prompt), None)
    return not isinstance(first, int | np.integer | Mapping) or isinstance(first, bool)


def encode(params: Params, prompt: Any, raw: bool) -> np.ndarray:
    """Checked token ids of one prompt, [n] int32."""
    vocab, context = params.target_config.vocab_size, params.target_config.max_position_embeddings
    if not isinstance(prompt, str | Sequence | np.ndarray | jax.Array):
        raise ValueError(f"prompt={prompt!r}: give text, messages, or token ids")
    if isinstance(prompt, np.ndarray | jax.Array) and prompt.ndim != 1:
        raise ValueError(f"prompt: an array of {prompt.ndim} axes a row; give one axis of ids")
    if len(prompt) == 0 or (isinstance(prompt, str) and not prompt.strip()):
        raise ValueError(f"prompt={prompt!r}: empty; give some text, messages, or token ids")
    if isinstance(prompt, str) or (isinstance(prompt, Sequence) and isinstance(prompt[0], Mapping)):
        prompt = _tokenize(params.tokenizer, prompt, raw)
    try:
        ids = np.asarray(prompt)
    except ValueError:  # ragged
        ids = np.empty(0, object)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"prompt={str(prompt)[:60]}: must be text, messages, or integer token ids")
    outside = ids[(ids < 0) | (ids >= vocab)]
    if outside.size:
        raise ValueError(f"prompt: token id {outside[0]} is outside the vocabulary 0..{vocab - 1}")
    if len(ids) >= context:
        raise ValueError(
            f"prompt: {len(ids)} tokens leave no room in the context of {context}; shorten it"
        )
    return ids.astype(np.int32)


def _tokenize(tokenizer: Tokenizer | None, prompt: str | Sequence[Any], raw: bool) -> list[int]:
    """Ids of a text or a chat; a text is a user's message wherever there is a chat template."""
    if tokenizer is None:
        raise ValueError("prompt: text needs a tokenizer, and params has none; give token ids")
    if not isinstance(prompt, str):
        return tokenizer.chat(prompt)
    if not raw and tokenizer.chat_template is not None:
        return tokenizer.chat([{"role": "user", "content": prompt}])
    if not prompt.isascii() and any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise ValueError("prompt: holds a lone surrogate; give valid Unicode")
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return bos + tokenizer.encode(prompt)
