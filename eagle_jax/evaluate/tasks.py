"""Tasks: named lists of questions, from files in Spec-Bench's and FastChat's format or our own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from eagle_jax.evaluate.prompts import OWN
from eagle_jax.inputs import parse_json, read_lines

PUBLIC = ("mt_bench", "humaneval", "gsm8k", "alpaca")
_SUFFIXES = (".jsonl", ".jsonl.gz")


@dataclasses.dataclass(frozen=True)
class Question:
    """A question of one or more turns.

    Attributes:
        task: name of its task.
        id: its `question_id`, or else its line number; unique in the task.
        category: its category; may be empty.
        turns: the user's messages.
    """

    task: str
    id: str
    category: str
    turns: tuple[str, ...]


def read_tasks(names: Sequence[str], data: str = "", limit: int = 0) -> dict[str, list[Question]]:
    """Returns the questions of each task.

    Args:
        names: "own", or NAME for `data`/NAME.jsonl (or .jsonl.gz). Without names, the default is
            "own" without `data`, else those of `PUBLIC` that `data` has.
        data: directory of question files.
        limit: questions of each task, evenly spaced over its file; 0 takes all.

    Raises:
        ValueError: a task is unknown (the message lists the valid ones), or a file is empty or
            malformed (the message names the line).
    """
    folder = Path(data).expanduser() if data else None
    if folder is not None and not folder.is_dir():
        raise ValueError(f"data={data!r}: no such directory; give one with NAME.jsonl files")
    files = {} if folder is None else _files(folder)
    chosen = list(names)
    if not chosen:
        chosen = ["own"] if folder is None else [name for name in PUBLIC if name in files]
    if not chosen:
        raise ValueError(
            f"data={data!r}: holds none of {', '.join(PUBLIC)} (.jsonl); name others with --tasks"
        )
    out = {}
    for name in chosen:
        if name != "own" and name not in files:
            valid = ", ".join(["own", *files])
            where = f"data={data!r}" if data else "no data directory is given (--data DIR)"
            raise ValueError(f"tasks={name!r}: unknown; use {valid}: {where}")
        questions = _own() if name == "own" else list(_read(name, files[name]))
        count = min(limit or len(questions), len(questions))
        out[name] = [questions[i * len(questions) // count] for i in range(count)]
    return out


def _files(folder: Path) -> dict[str, Path]:
    """Returns question files by task name; a plain file is preferred to a compressed one."""
    return {
        path.name.removesuffix(suffix): path
        for suffix in reversed(_SUFFIXES)
        for path in sorted(folder.glob(f"*{suffix}"))
    }


def _own() -> list[Question]:
    return [
        Question("own", str(i), category, turns) for i, (category, turns) in enumerate(OWN, start=1)
    ]


def _read(task: str, path: Path) -> Iterator[Question]:
    seen: dict[str, int] = {}
    for number, line in read_lines(path):
        where = f"{path}:{number}"
        question = _parse(task, line, number, where)
        if question.id in seen:
            raise ValueError(
                f"{where}: question_id {question.id} stands in line {seen[question.id]} already"
            )
        seen[question.id] = number
        yield question
    if not seen:
        raise ValueError(f"{path}: empty; write one question a line")


def _parse(task: str, line: bytes, number: int, where: str) -> Question:
    record = parse_json(line, where, "write one object a line")
    turns = record.get("turns") if isinstance(record, dict) else None
    if not isinstance(turns, list) or not turns:
        raise ValueError(f'{where}: no "turns"; write {{"turns": ["question", ...]}}')
    for turn in turns:
        if not isinstance(turn, str) or not turn.strip():
            raise ValueError(f"{where}: turns={str(turns)[:60]}: every turn must be some text")
        if any("\ud800" <= letter <= "\udfff" for letter in turn):
            raise ValueError(f"{where}: turns hold a lone surrogate; give valid Unicode")
    return Question(
        task,
        str(record.get("question_id", f"line {number}")),
        str(record.get("category") or ""),
        tuple(turns),
    )
