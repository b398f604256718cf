"""Files of conversations and of prompts: JSONL, plain or gzip."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from eagle_jax.inputs import parse_json, read_lines
from eagle_jax.text.messages import Message, check_messages
from eagle_jax.text.tokenizer import Tokenizer


def read_conversations(path: str | Path) -> Iterator[list[Message]]:
    """Reads conversations from JSONL, plain or gzip (`.gz`); blank lines are skipped.

    Each line is `{"messages": [{"role": ..., "content": ...}, ...]}`; other keys are ignored.

    Raises:
        ValueError: the file is missing, or a line is not a conversation with an assistant turn; the
            message names the file and the line, counted from 1.
    """
    for where, messages, _ in _read_records(path):
        if all(message["role"] != "assistant" for message in messages):
            raise ValueError(f"{where}: no assistant turn to learn from; add one or drop the line")
        yield messages


def encode_files(
    files: Iterable[str | Path], tokenizer: Tokenizer
) -> Iterator[tuple[list[int], list[int]]]:
    """Yields ids and mask (`Tokenizer.conversation`) of every conversation; shows a progress bar.

    Raises:
        ValueError: as in `read_conversations` and `Tokenizer.conversation`.
    """
    import tqdm

    conversations = itertools.chain.from_iterable(map(read_conversations, files))
    with tqdm.tqdm(desc="tokenizing", unit=" conversations", disable=None) as bar:
        while chunk := list(itertools.islice(conversations, 512)):
            yield from tokenizer.conversations(chunk)
            bar.update(len(chunk))


def read_prompts(path: str | Path) -> Iterator[list[Message]]:
    """Yields the prompts in a file: each conversation up to its last user message.

    Raises:
        ValueError: as in `read_conversations`, or a conversation has no user message.
    """
    for _, messages, _ in read_requests(path):
        yield messages


def read_requests(path: str | Path) -> Iterator[tuple[str, list[Message], dict[str, Any]]]:
    """Yields `file:line`, the prompt and the whole record of every line of a file.

    Raises:
        ValueError: as in `read_prompts`.
    """
    for where, messages, record in _read_records(path):
        users = [i for i, message in enumerate(messages) if message["role"] == "user"]
        if not users:
            raise ValueError(f"{where}: no user message to answer; add one or drop the line")
        yield where, messages[: users[-1] + 1], record


def _read_records(path: str | Path) -> Iterator[tuple[str, list[Message], dict[str, Any]]]:
    """Yields `file:line`, the checked messages and the whole record of every line."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"conversations={str(path)!r}: no such file; give a .jsonl or .jsonl.gz")
    for number, line in read_lines(path):
        where = f"{path}:{number}"
        record = _parse_record(line, where)
        yield where, record["messages"], record


def _parse_record(line: bytes, where: str) -> dict[str, Any]:
    record = parse_json(line, where, "write one object a line")
    if not isinstance(record, dict) or "messages" not in record:
        raise ValueError(f'{where}: no "messages"; write {{"messages": [...]}} on every line')
    try:
        check_messages(record["messages"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return record
