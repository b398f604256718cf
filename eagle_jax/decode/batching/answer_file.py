"""Answer a file of prompts in batches: `python -m eagle_jax.decode --input --output`.

Each output line is the conversation with the model's answer in place of whatever followed the last
user message. Lines are written as answers finish (longest prompts first, so that memory trouble
shows at once); a run that was stopped goes on where it ended.
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
_START = b'{"index": '  # of every line written here
# Keys of an input line that an answer replaces or leaves out; all others are kept.
_OWN_KEYS = {"index", "messages", "finish", "settings", "sampling", "logprobs"}
# What else of a model's directory decides how text becomes tokens, and where answers end.
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
    """Answer every conversation of `source` and append to `target`.

    Args:
        params: of the model.
        source: conversations, JSONL, plain or gzip. A line may have settings of its own,
            `"sampling": {"temperature": 0.5}`, which go before those given here.
        target: receives one line per prompt: `{"index", "messages", "finish", "settings"}`;
            "finish" is "stop" (an end token or a stop string) or "length"; "settings" are all that
            the answer depends on besides the model. With `logprobs`, the line has those too.
            Other keys of the input line, such as an id, are kept.
        batch_size: rows decoded together; an answer that is finished makes room for a prompt.
        limit: answer the first so many only.
        sampling: how tokens are drawn; row i of the file takes the seed plus i, unless the line has
            a seed of its own, so batching never changes an answer.
        method: as in `generate`.
        max_new_tokens: longest answer; prompts that leave less room than this are skipped.
        raw: not allowed here, answers are chat turns.
        exact: not allowed here.
        **settings: the fields of `SamplingParams` as keywords, in the place of `sampling`.

    Returns:
        Counts, seconds and tokens per second, for one JSON line.

    Raises:
        ValueError: a malformed line, with its number; a target that this function did not write
            for this source.
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
    # One method for all groups of prompts, also where the last has fewer rows.
    method = check_method(params, method, batch_size, shared.temperature)
    check_whole("max_new_tokens", max_new_tokens)
    context = params.target_config.max_position_embeddings
    if max_new_tokens >= context:
        raise ValueError(f"max_new_tokens={max_new_tokens}: the context is {context}; use less")
    # What an answer depends on besides its prompt.
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
        distributed.wait_for_all("answers")  # before the first process writes more
        waiting = sorted(set(fitting) - done, key=lambda i: (-len(encoded[i]), i))
        before = len(fitting) - len(waiting)
        with tqdm(total=len(fitting), initial=before, unit="prompt", disable=not waiting) as bar:
            # One cache size per bucket of prompts: attention reads all of it.
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
    """A hash of the target's weights and tokenizer, on which every answer depends.

    It is that of the files that `params` was loaded from, so that it does not depend on the device
    nor on the layout in memory; of the arrays, where there are no files.
    """
    root = params.directory
    if root is None or not root.is_dir():
        return fingerprint.of_params(params.with_draft(None))
    directory = root / "target" if (root / "target").is_dir() else root
    texts = [directory / name for name in _TEXT_FILES]
    contents = [path.read_bytes() if path.is_file() else b"" for path in texts]
    return fingerprint.of_texts(fingerprint.of_weight_files(directory), *contents)


def _target_changes(params: Params, method: str | Method) -> dict[str, Any]:
    """Settings by which answers are not those of the float target with `Exact`, if any."""
    changes: dict[str, Any] = {}
    if params.quantize is not None:
        changes["quantize"] = params.quantize
    rule = getattr(method, "rule", Exact())
    if isinstance(method, Method) and rule != Exact():
        # The answers then depend on what is drafted, too.
        changes["method"] = spell(method)
        changes["drafts"] = fingerprint.of_params(params.with_draft(method.draft))
    return changes


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
    """The file of answers, to append to; locked by the first process, which alone writes."""
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
    """The settings of every line: those of all, with the line's own in their place."""
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
    """Index, answer, text, log-probabilities and last piece of every prompt, as they finish."""
    # Rows with stop strings wait for the host, which looks between chunks.
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
    """Indices of finished lines; a line that a kill cut short is cut away."""
    if not path.exists():
        return set()
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    torn = data[len(whole) :]
    try:
        done = {_index(line, prompts, settings) for line in whole.splitlines()}
        # Nobody else's file is cut: not even one without a line break.
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
    """Says in which settings a finished line differs."""


def _index(line: bytes, prompts: Sequence[Messages], settings: list[dict[str, Any]]) -> int:
    """Which prompt a finished line answers; one beyond the limit is not looked at."""
    record = json.loads(line)
    index, asked, found = record["index"], record["messages"][:-1], record["settings"]
    if type(index) is not int or index < 0 or (index < len(prompts) and asked != prompts[index]):
        raise ValueError
    if index < len(settings):
        wanted = settings[index]
    else:  # its own settings stand in a line that was not read
        wanted = {**settings[0], "sampling": found.get("sampling")} if settings else found
    if found != wanted:
        names = [name for name in wanted | found if found.get(name) != wanted.get(name)]
        raise _OtherSettings(
            ", ".join(f"{n} is {found.get(n)!r} there and {wanted.get(n)!r} here" for n in names)
        )
    return index
