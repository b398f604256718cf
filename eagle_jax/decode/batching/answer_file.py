"""Answer a file of prompts in batches: `python -m eagle_jax.decode --input --output`.

Each output line is the conversation up to its last user message, followed by the model's answer.
Lines are written as answers finish (longest prompts first, so that a lack of memory shows at once).
A run that was stopped continues where it ended.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Unpack

from tqdm import tqdm

from eagle_jax import distributed, fingerprint, outputs
from eagle_jax.checks import check_whole
from eagle_jax.decode.acceptance import Exact
from eagle_jax.decode.batching.batcher import Batcher, Piece
from eagle_jax.decode.method import Method
from eagle_jax.decode.method_cli import spell
from eagle_jax.decode.program import bucket_prompt
from eagle_jax.decode.sampling import SamplingParams, Settings, Vocabulary, rows_of
from eagle_jax.decode.session import check_method
from eagle_jax.params import Params
from eagle_jax.text import read_requests

Messages = list[dict[str, str]]
_START = b'{"index": '  # every line written here starts with this
# Keys of an input line that an answer replaces or leaves out; all others are kept.
_OWN_KEYS = {"index", "messages", "finish", "settings", "sampling", "logprobs"}
# Files in a model's directory that decide how text becomes tokens and where answers end.
_TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def answer_file(
    params: Params,
    source: str | Path,
    target: str | Path,
    *,
    batch_size: int = 8,
    limit: int | None = None,
    sampling: SamplingParams | None = None,
    method: str | Method = "eagle",
    max_new_tokens: int = 256,
    raw: bool = False,
    exact: bool = False,
    **settings: Unpack[Settings],
) -> dict[str, Any]:
    """Answer every conversation of `source` and append the answers to `target`.

    Args:
        params: the model.
        source: conversations in JSONL, plain or gzip. A line may have its own settings,
            `"sampling": {"temperature": 0.5}`, which override those given here.
        target: receives one line per prompt: `{"index", "messages", "finish", "settings"}`.
            "finish" is "stop" (an end token or a stop string) or "length". "settings" holds
            everything that the answer depends on besides its prompt. With `logprobs`, the line
            also has the log-probabilities. Other keys of the input line, such as an id, are kept.
        batch_size: rows decoded together; a waiting prompt takes the row of a finished answer.
        limit: number of conversations to answer, from the first on; None answers all.
        sampling: how tokens are drawn; line i of the file uses the seed plus i, unless it sets its
            own seed, so batching never changes an answer.
        method: as in `generate`.
        max_new_tokens: longest answer; prompts that leave less room in the context are skipped.
        raw: must be False, because answers are chat turns.
        exact: must be False.
        **settings: the fields of `SamplingParams` as keywords, instead of `sampling`.

    Returns:
        Counts, seconds and tokens per second, as one JSON object.

    Raises:
        ValueError: a line is malformed (the message has its number), or `target` exists and holds
            something other than answers to `source` with these settings.
    """
    target = Path(target).expanduser()
    outputs.check_file("output", target)
    if raw:
        raise ValueError("raw=True: a file of conversations is answered through the chat template")
    check_whole("batch_size", batch_size)
    if params.tokenizer is None:
        raise ValueError("params: answering conversations needs a tokenizer")
    if limit is not None:
        check_whole("limit", limit)
    [shared] = rows_of(1, sampling, settings)
    if exact:
        raise ValueError(
            "exact=True: prompts of a file are prefilled as rows get free; use generate"
        )
    # One method serves all groups of prompts, even if the last group has fewer rows.
    method = check_method(params, method, batch_size, shared.temperature)
    check_whole("max_new_tokens", max_new_tokens)
    context = params.target_config.max_position_embeddings
    if max_new_tokens >= context:
        raise ValueError(f"max_new_tokens={max_new_tokens}: the context is {context}; use less")
    # Everything that an answer depends on besides its prompt.
    common = {
        "model": model_fingerprint(params),
        "dtype": params.dtype.name,
        "max_new_tokens": max_new_tokens,
        **_target_changes(params, method),
    }
    lines = list(itertools.islice(read_requests(source), limit))
    prompts = [prompt for _, prompt, _ in lines]
    drawn = _settings(params, shared, lines)
    settings_of = [{**common, "sampling": row.to_dict()} for row in drawn]
    encoded = [params.tokenizer.chat(prompt) for prompt in prompts]
    room = context - max_new_tokens
    fitting = [i for i, ids in enumerate(encoded) if len(ids) <= room]

    begin, tokens, rounds = time.perf_counter(), 0, 0
    with _opened(target) as out:
        done = _answered(target, prompts, settings_of)
        distributed.wait_for_all("answers")  # all must have read before the first one writes
        waiting = sorted(set(fitting) - done, key=lambda i: (-len(encoded[i]), i))
        before = len(fitting) - len(waiting)
        with tqdm(total=len(fitting), initial=before, unit="prompt", disable=not waiting) as bar:
            # One cache size per bucket of prompt lengths, since attention reads the whole cache.
            for _, group in itertools.groupby(waiting, lambda i: _bucket(encoded[i])):
                asked = {i: encoded[i] for i in group}
                for i, ids, text, logprobs, last in _decode(
                    params, asked, drawn, method, max_new_tokens, batch_size
                ):
                    line = {
                        "index": i,
                        "messages": [*prompts[i], {"role": "assistant", "content": text}],
                        "finish": last.finish,
                        "settings": settings_of[i],
                        **{k: v for k, v in lines[i][2].items() if k not in _OWN_KEYS},
                        **({} if logprobs is None else {"logprobs": logprobs}),
                    }
                    with outputs.naming(target):
                        out.write(json.dumps(line, ensure_ascii=False) + "\n")
                        out.flush()
                    tokens, rounds = tokens + len(ids), rounds + last.rounds
                    bar.update()
    seconds = time.perf_counter() - begin
    return {
        "prompts": len(prompts),
        "answered": len(waiting),
        "already_answered": before,
        "too_long": len(prompts) - len(fitting),
        "new_tokens": tokens,
        "tau": tokens / max(rounds, 1),
        "seconds": seconds,
        "tokens_per_second": tokens / max(seconds, 1e-9),
        "output": str(target),
    }


def model_fingerprint(params: Params) -> str:
    """Returns a hash of the target's weights and tokenizer, on which every answer depends.

    It hashes the files that `params` was loaded from, so it depends neither on the device nor on
    the memory layout. Without files, it hashes the arrays.
    """
    root = params.directory
    if root is None or not root.is_dir():
        return fingerprint.of_params(params.with_draft(None))
    directory = root / "target" if (root / "target").is_dir() else root
    texts = [directory / name for name in _TEXT_FILES]
    contents = [path.read_bytes() if path.is_file() else b"" for path in texts]
    return fingerprint.of_texts(fingerprint.of_weight_files(directory), *contents)


def _target_changes(params: Params, method: str | Method) -> dict[str, Any]:
    """Returns the settings, if any, that change answers: quantisation, and rules but `Exact`."""
    changes: dict[str, Any] = {}
    if params.quantize is not None:
        changes["quantize"] = params.quantize
    rule = getattr(method, "rule", Exact())
    if isinstance(method, Method) and rule != Exact():
        # With other rules the answers also depend on what is drafted.
        changes["method"] = spell(method)
        changes["drafts"] = fingerprint.of_params(params.with_draft(method.draft))
    return changes


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
    """Opens the output file to append; only the first process locks it and writes to it."""
    first = distributed.first()
    with outputs.closing(open(path if first else os.devnull, "a", encoding="utf-8"), path) as out:
        error = None
        if first:
            try:
                outputs.lock(out, "output", path)
            except ValueError as found:
                error = found
        distributed.raise_together(error, f"output={str(path)!r}")
        yield out


def _bucket(ids: Sequence[int]) -> int:
    return bucket_prompt(len(ids))


def _settings(
    params: Params, shared: SamplingParams, lines: Sequence[tuple[str, Messages, dict[str, Any]]]
) -> list[SamplingParams]:
    """Returns the settings of every line: the shared ones, overridden by the line's own."""
    vocabulary, out = Vocabulary.of(params), []
    for i, (where, _, record) in enumerate(lines):
        own = dataclasses.replace(shared, seed=(shared.seed + i) % 2**32)
        try:
            own = own.override(record.get("sampling", {}))
            vocabulary.resolve(own)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        out.append(own)
    return out


def _decode(
    params: Params,
    prompts: dict[int, list[int]],
    sampling: Sequence[SamplingParams],
    method: Method,
    max_new_tokens: int,
    batch_size: int,
) -> Iterator[tuple[int, list[int], str, list[Any] | None, Piece]]:
    """Yields index, tokens, text, log-probabilities and last piece of each prompt that finishes."""
    # Only the host finds stop strings, between two chunks, so chunks are short if there are any.
    chunk = 16 if any(sampling[i].stop for i in prompts) else max_new_tokens
    batcher = Batcher(
        params,
        method=method,
        rows=min(batch_size, len(prompts)),
        max_prompt=max(map(len, prompts.values())),
        max_new_tokens=max_new_tokens,
        chunk=chunk,
        waiting=len(prompts),
    )
    asked = {batcher.submit(ids, sampling[i]): i for i, ids in prompts.items()}
    pieces: dict[int, list[Piece]] = collections.defaultdict(list)
    for piece in batcher.run():
        pieces[piece.request].append(piece)
        if piece.finish is not None:
            own = pieces.pop(piece.request)
            tokens = [token for part in own for token in part.tokens.tolist()]
            logprobs = None
            if piece.logprobs is not None:
                logprobs = [dataclasses.asdict(x) for part in own for x in part.logprobs or ()]
            text = "".join(part.text or "" for part in own)
            yield asked[piece.request], tokens, text, logprobs, piece


def _answered(path: Path, prompts: Sequence[Messages], settings: list[dict[str, Any]]) -> set[int]:
    """Returns the indices of finished lines and removes an incomplete last line."""
    if not path.exists():
        return set()
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    torn = data[len(whole) :]
    try:
        done = {_index(line, prompts, settings) for line in whole.splitlines()}
        # Only a line that this module wrote is removed; any other file stays whole.
        if not (torn.startswith(_START) or _START.startswith(torn)):
            raise ValueError
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        differs = f": {error}" if isinstance(error, _OtherSettings) else ""
        raise ValueError(
            f"output={str(path)!r}: holds no answers to this input with these settings{differs}; "
            "give another file"
        ) from error
    if torn and distributed.first():
        os.truncate(path, len(whole))
    return done


class _OtherSettings(ValueError):
    """The error that names the settings in which a finished line differs."""


def _index(line: bytes, prompts: Sequence[Messages], settings: list[dict[str, Any]]) -> int:
    """Returns the index of the prompt that a finished line answers.

    Raises an error if its messages or settings differ; messages beyond the limit are not compared.
    """
    record = json.loads(line)
    index, asked, found = record["index"], record["messages"][:-1], record["settings"]
    if type(index) is not int or index < 0 or (index < len(prompts) and asked != prompts[index]):
        raise ValueError
    if index < len(settings):
        wanted = settings[index]
    else:  # its input line, which may have its own settings, was not read
        wanted = {**settings[0], "sampling": found.get("sampling")} if settings else found
    if found != wanted:
        names = [name for name in wanted | found if found.get(name) != wanted.get(name)]
        raise _OtherSettings(
            ", ".join(f"{n} is {found.get(n)!r} there and {wanted.get(n)!r} here" for n in names)
        )
    return index
