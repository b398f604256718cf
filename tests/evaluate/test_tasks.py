"""Question files."""

import gzip
import json
import re

import pytest

from eagle_jax.evaluate.prompts import OWN
from eagle_jax.evaluate.tasks import read_tasks

GOOD = {"question_id": 3, "category": "a", "turns": ["one", "two"], "reference": ["x"]}


def write(folder, name: str, *lines: str) -> str:
    (folder / name).write_text("".join(line + "\n" for line in lines))
    return str(folder)


def test_own_prompts_need_no_file() -> None:
    """Catches a bare clone that cannot evaluate, and own prompts that repeat."""
    questions = read_tasks([])["own"]
    assert len(questions) == len(OWN) >= 24
    assert len({question.turns[0] for question in questions}) == len(questions)
    assert any(len(question.turns) == 2 for question in questions)
    assert len({question.category for question in questions}) >= 4


def test_files_are_read_as_they_are(tmp_path) -> None:
    """Catches a lost turn, an id that is not kept, blank lines that count as questions, and a limit
    that takes the first questions, which often are of one category."""
    data = write(tmp_path, "mt_bench.jsonl", json.dumps(GOOD), "", '{"turns": ["three"]}')
    (tmp_path / "mine.jsonl.gz").write_bytes(gzip.compress(b'{"turns": ["four"]}\n'))
    found = read_tasks([], data)
    assert list(found) == ["mt_bench"]
    first, second = found["mt_bench"]
    assert (first.id, first.category, first.turns) == ("3", "a", ("one", "two"))
    assert (second.id, second.category, second.turns) == ("line 3", "", ("three",))
    assert [q.turns for q in read_tasks(["mine"], data)["mine"]] == [("four",)]
    lines = [json.dumps({**GOOD, "question_id": i}) for i in range(5)]
    data = write(tmp_path, "five.jsonl", *lines)
    for limit, ids in ((1, "0"), (2, "02"), (3, "013"), (5, "01234"), (9, "01234")):
        assert "".join(q.id for q in read_tasks(["five"], data, limit)["five"]) == ids


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "q.jsonl: empty; write one question a line"),
        ([json.dumps(GOOD), "{"], "q.jsonl:2: not JSON ("),
        (["[1]"], 'q.jsonl:1: no "turns"; write'),
        (['{"turns": []}'], 'q.jsonl:1: no "turns"; write'),
        (['{"turns": "Hi"}'], 'q.jsonl:1: no "turns"; write'),
        (["", '{"turns": ["a", " "]}'], "q.jsonl:2: turns=['a', ' ']: every turn must be"),
        (['{"turns": ["\\ud800"]}'], "q.jsonl:1: turns hold a lone surrogate"),
        ([json.dumps(GOOD)] * 2, "q.jsonl:2: question_id 3 stands in line 1 already"),
    ],
)
def test_malformed_files(tmp_path, lines, said) -> None:
    """Catches a traceback, or a broken question that is silently left out."""
    data = write(tmp_path, "q.jsonl", *lines)
    with pytest.raises(ValueError, match=re.escape(said)) as info:
        read_tasks(["q"], data)
    assert "\n" not in str(info.value)


def test_unknown_tasks_list_the_valid_ones(tmp_path) -> None:
    """Catches a misspelt task that is left out, and a default that finds nothing to ask."""
    data = write(tmp_path, "q.jsonl", json.dumps(GOOD))
    with pytest.raises(ValueError, match="tasks='p': unknown; use own, q: data="):
        read_tasks(["p"], data)
    with pytest.raises(ValueError, match="unknown; use own: no data directory is given"):
        read_tasks(["mt_bench"])
    with pytest.raises(ValueError, match="holds none of mt_bench, humaneval, gsm8k, alpaca"):
        read_tasks([], data)
    with pytest.raises(ValueError, match="no such directory"):
        read_tasks([], str(tmp_path / "nowhere"))


def test_a_damaged_archive_is_named(tmp_path) -> None:
    """Catches a traceback from a download that was cut short."""
    whole = gzip.compress(b'{"turns": ["four"]}\n' * 50)
    (tmp_path / "q.jsonl.gz").write_bytes(whole[:-9])
    with pytest.raises(ValueError, match="damaged gzip"):
        read_tasks(["q"], str(tmp_path))
