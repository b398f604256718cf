"""`generate` and `stream`: decode prompts by any method through the one engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from eagle_jax.checks import check_whole
from eagle_jax.decode.method import Method
from eagle_jax.decode.prompts import Prompt, is_batch
from eagle_jax.decode.session import Generation, Options, Session
from eagle_jax.params import Params
from eagle_jax.text import StreamDecoder


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
    session = Session(
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
    check_whole("rounds_per_chunk", rounds_per_chunk)
    if is_batch(prompt):  # before anything is compiled
        raise ValueError("prompt: stream takes one prompt; use generate for a batch")
    session = Session(
        params,
        prompt,
        Options(method, max_new_tokens, temperature, top_k, top_p, ignore_eos, exact),
        seed,
        raw,
    )
    return _stream(session, rounds_per_chunk)


def _stream(session: Session, rounds_per_chunk: int) -> Iterator[Generation]:
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
