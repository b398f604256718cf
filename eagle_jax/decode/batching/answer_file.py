"""Answer a file of prompts in batches: `python -m eagle_jax.decode --input --output`.

Each output line is the conversation with the model's answer in place of whatever followed the last
user message. Lines are written as answers finish (longest prompts first, so that memory trouble
shows at once); a run that was stopped goes on where it ended.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from eagle_jax import distributed, outputs
from eagle_jax.checkpoint import files
from eagle_jax.decode import tuning_store
from eagle_jax.decode.acceptance import Exact
from eagle_jax.decode.batching.batcher import Batcher, Piece
from eagle_jax.decode.method import Method
from eagle_jax.decode.method_cli import spell
from eagle_jax.decode.program import bucket_prompt
from eagle_jax.decode.session import Options
from eagle_jax.params import Params
from eagle_jax.text import read_prompts

Messages = list[dict[str, str]]
_START = b'{"index": '  # of every line written here
# What else of a model's directory decides how text becomes tokens, and where answers end.
_TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def answer_file(
    params: Params,
    source: str | Path,
    target: str | Path,
    *,
    batch_size: int = 8,
    limit: int | None = None,
    seed: int = 0,
    max_new_tokens: int = 256,
    raw: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Answer every conversation of `source` and append to `target`.

    Args:
        params: of the model.
        source: conversations, JSONL, plain or gzip.
        target: receives one line per prompt: `{"index", "messages", "finish", "settings"}`;
            "finish" is "stop" (the model ended its answer) or "length".
        batch_size: rows decoded together; an answer that is finished makes room for a prompt.
        limit: answer the first so many only.
        seed: row i of the file is sampled with seed + i, so batching never changes an answer.
        max_new_tokens: longest answer; prompts that leave less room than this are skipped.
        raw: not allowed here, answers are chat turns.
        **options: as `generate`.

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
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be at least 1")
    if params.tokenizer is None:
        raise ValueError("params: answering conversations needs a tokenizer")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: must be at least 1")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed}: must be at least 0 and below 2**32")
    shared = Options(max_new_tokens=max_new_tokens, **options)
    if shared.exact:
        raise ValueError(
            "exact=True: prompts of a file are prefilled as rows get free; use generate"
        )
    # One method for all groups of prompts, also where the last has fewer rows.
    shared = dataclasses.replace(shared, method=shared.check(params, batch_size)[1])
    context = params.target_config.max_position_embeddings
    if max_new_tokens >= context:
        raise ValueError(f"max_new_tokens={max_new_tokens}: the context is {context}; use less")
    settings = {
        "model": model_fingerprint(params),
        "dtype": params.dtype.name,
        "seed": seed,
        "max_new_tokens": max_new_tokens,
        "temperature": shared.temperature,
        "top_k": shared.top_k,
        "top_p": shared.top_p,
        **_target_changes(params, shared.method),
    }
    prompts = list(itertools.islice(read_prompts(source), limit))
    encoded = [params.tokenizer.chat(prompt) for prompt in prompts]
    room = context - max_new_tokens
    fitting = [i for i, ids in enumerate(encoded) if len(ids) <= room]

    begin, tokens, rounds = time.perf_counter(), 0, 0
    with _opened(target) as out:
        done = _answered(target, prompts, settings)
        distributed.wait_for_all("answers")  # before the first process writes more
        waiting = sorted(set(fitting) - done, key=lambda i: (-len(encoded[i]), i))
        before = len(fitting) - len(waiting)
        with tqdm(total=len(fitting), initial=before, unit="prompt") as bar:
            # One cache size per bucket of prompts: attention reads all of it.
            for _, group in itertools.groupby(waiting, lambda i: _bucket(encoded[i])):
                asked = {i: encoded[i] for i in group}
                for i, ids, last in _decode(params, asked, batch_size, seed, shared):
                    text = params.tokenizer.decode(ids)
                    line = {
                        "index": i,
                        "messages": [*prompts[i], {"role": "assistant", "content": text}],
                        "finish": last.finish,
                        "settings": settings,
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
        return tuning_store.fingerprint(params.only(None))
    directory = root / "target" if (root / "target").is_dir() else root
    digest = hashlib.sha256(files.fingerprint(directory).encode())
    for name in _TEXT_FILES:
        path = directory / name
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()[:32]


def _target_changes(params: Params, method: str | Method) -> dict[str, Any]:
    """Settings by which answers are not those of the float target with `Exact`, if any."""
    changes: dict[str, Any] = {}
    if params.quantize is not None:
        changes["quantize"] = params.quantize
    rule = getattr(method, "rule", Exact())
    if isinstance(method, Method) and rule != Exact():
        # The answers then depend on what is drafted, too.
        changes["method"] = spell(method)
        changes["drafts"] = tuning_store.fingerprint(params.only(method.draft))
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


def _decode(
    params: Params,
    prompts: dict[int, list[int]],
    batch_size: int,
    seed: int,
    options: Options,
) -> Iterator[tuple[int, list[int], Piece]]:
    """Index, answer and last piece of every prompt, as they finish."""
    shared = {name: value for name, value in vars(options).items() if name != "exact"}
    batcher = Batcher(
        params,
        rows=min(batch_size, len(prompts)),
        max_prompt=max(map(len, prompts.values())),
        chunk=options.max_new_tokens,
        waiting=len(prompts),
        **shared,
    )
    asked = {batcher.submit(ids, seed=(seed + i) % 2**32): i for i, ids in prompts.items()}
    answers: dict[int, list[int]] = collections.defaultdict(list)
    for piece in batcher.run():
        answers[piece.request] += piece.tokens.tolist()
        if piece.finish is not None:
            yield asked[piece.request], answers.pop(piece.request), piece


def _answered(path: Path, prompts: Sequence[Messages], settings: dict[str, Any]) -> set[int]:
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


def _index(line: bytes, prompts: Sequence[Messages], settings: dict[str, Any]) -> int:
    """Which prompt a finished line answers; one beyond the limit is not looked at."""
    record = json.loads(line)
    index, asked, found = record["index"], record["messages"][:-1], record["settings"]
    if type(index) is not int or index < 0 or (index < len(prompts) and asked != prompts[index]):
        raise ValueError
    if found != settings:
        names = [name for name in settings | found if found.get(name) != settings.get(name)]
        raise _OtherSettings(
            ", ".join(f"{n} is {found.get(n)!r} there and {settings.get(n)!r} here" for n in names)
        )
    return index
