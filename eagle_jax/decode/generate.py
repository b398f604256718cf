"""`generate` and `stream`: decode prompts by any method through the one engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Unpack

from eagle_jax.checks import check_whole
from eagle_jax.decode.generation import Generation
from eagle_jax.decode.method import Method
from eagle_jax.decode.prompts import Prompt, is_batch
from eagle_jax.decode.sampling.params import SamplingParams, Settings
from eagle_jax.decode.session import Session
from eagle_jax.params import Params


def generate(
    params: Params,
    prompt: Prompt,
    *,
    sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    method: str | Method = "eagle",
    max_new_tokens: int = 256,
    raw: bool = False,
    exact: bool = False,
    **settings: Unpack[Settings],
) -> Generation:
    """Decode answers to one prompt or to a batch.

    Args:
        params: from `eagle_jax.load`.
        prompt: a string (a user's message, if the tokenizer has a chat template), a chat (list of
            `{"role", "content"}`), token ids, or a list of any of these: a batch.
        sampling: how tokens are drawn; the default is greedy. Either one `SamplingParams` for all
            rows (row i then uses seed + i), or a list with one per row. In float32 a row's text
            depends only on its prompt and these settings, not on the method or the other rows.
        method: a name in `METHODS`, an instance such as `Eagle(tree=chain(5))`, or "auto", which
            selects the method that `eagle-jax tune` measured as the fastest for this model on
            this machine; the statistics name it.
        max_new_tokens: longest answer; the model's context may end it sooner.
        raw: use strings as they are, without the chat template.
        exact: makes every method return identical text in bfloat16 too, for the same batch of
            prompts (except with acceptance rules that are lossy or keep only the distribution).
            Without it, passes over different numbers of tokens round differently in bfloat16, so
            near-ties may differ. Every pass then has 128 nodes and one order of summation, which
            is slower; use it for checks.
        **settings: the fields of `SamplingParams` as keywords, such as `temperature=0.7, seed=1`,
            instead of `sampling`; `seed` may be a list with one per row.

    Returns:
        The text, the token ids and the statistics.

    Raises:
        ValueError: an argument is invalid, or a prompt is empty or longer than the context.
        TypeError: an unknown keyword.
    """
    session = Session(
        params,
        prompt,
        sampling,
        method=method,
        max_new_tokens=max_new_tokens,
        raw=raw,
        exact=exact,
        **settings,
    )
    session.run()
    session.warn()
    return session.result()


def stream(
    params: Params,
    prompt: Prompt,
    *,
    rounds_per_chunk: int = 4,
    sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    method: str | Method = "eagle",
    max_new_tokens: int = 256,
    raw: bool = False,
    exact: bool = False,
    **settings: Unpack[Settings],
) -> Iterator[Generation]:
    """Decode one prompt and yield new text as it is decoded, with the program of `generate`.

    Args:
        params: as in `generate`.
        prompt: one prompt, in any form that `generate` takes.
        rounds_per_chunk: rounds that run on the device between two yields.
        sampling: as in `generate`.
        method: as in `generate`.
        max_new_tokens: as in `generate`.
        raw: as in `generate`.
        exact: as in `generate`.
        **settings: as in `generate`.

    Yields:
        Generations with the newly committed tokens; their `statistics` cover everything so far.
        Concatenated, they equal what `generate` returns. Text that may be the beginning of a stop
        string is held back until later tokens decide it.

    Raises:
        ValueError: as in `generate`, or the prompt is a batch.
        TypeError: an unknown keyword.
    """
    check_whole("rounds_per_chunk", rounds_per_chunk)
    if is_batch(prompt):  # before anything is compiled
        raise ValueError("prompt: stream takes one prompt; use generate for a batch")
    session = Session(
        params,
        prompt,
        sampling,
        method=method,
        max_new_tokens=max_new_tokens,
        raw=raw,
        exact=exact,
        **settings,
    )
    return _stream(session, rounds_per_chunk)


def _stream(session: Session, rounds_per_chunk: int) -> Iterator[Generation]:
    seen = 0
    while not session.finished():
        session.advance(rounds_per_chunk)
        session.warn()
        [(new, text)] = session.read()
        logprobs, drafted = session.logprobs(seen)[0], session.drafted()[0][seen:]
        seen += len(new)
        yield Generation(
            text,
            new,
            session.statistics(),
            session.finishes()[0],
            logprobs,
            drafted,
            session.params.tokenizer,
        )
