"""`python -m eagle_jax.decode --input --output`: a file of prompts."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

import eagle_jax
from eagle_jax.decode import SamplingParams, generate
from eagle_jax.decode.__main__ import main
from eagle_jax.decode.batching.answer_file import answer_file
from eagle_jax.params import Params

NEW = 60
SEED = 5
# Of different lengths, out of order; the third has a history, the last does not fit the context.
PROMPTS = [
    [{"role": "user", "content": "tell me more about it"}],
    [{"role": "user", "content": "Hi"}],
    [
        {"role": "user", "content": "0+1"},
        {"role": "assistant", "content": "is 1"},
        {"role": "user", "content": "naïve 日本"},
    ],
    [{"role": "user", "content": "abc " * 30}],  # of a larger bucket
    [{"role": "user", "content": "abc"}],
    [{"role": "user", "content": "long " * 60}],
]
OPTIONS: dict[str, Any] = {"max_new_tokens": NEW, "temperature": 1.0, "seed": SEED}


@pytest.fixture(scope="module")
def params(tiny_model: Path) -> Params:
    return eagle_jax.load(tiny_model)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The prompts, some with an old answer behind them, and a blank line among them."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    old = {"role": "assistant", "content": "an older answer"}
    lines = [{"messages": [*ask, old] if i % 2 else ask} for i, ask in enumerate(PROMPTS)]
    path.write_text("\n\n".join(json.dumps(line) for line in lines) + "\n")
    return path


@pytest.fixture(scope="module")
def whole(params, source, tmp_path_factory) -> Path:
    """All answers, two rows at a time."""
    path = tmp_path_factory.mktemp("whole") / "answers.jsonl"
    answer_file(params, source, path, batch_size=2, **OPTIONS)
    return path


def records(path: Path) -> list[dict]:
    return sorted(map(json.loads, path.read_bytes().splitlines()), key=lambda row: row["index"])


def test_every_row_is_answered_as_if_alone(params, whole) -> None:
    """Catches answers that change rows when sorted by length, and seeds of the batch's order."""
    rows = records(whole)
    assert [row["index"] for row in rows] == [0, 1, 2, 3, 4]
    for i, row in enumerate(rows):
        alone = generate(params, PROMPTS[i], **{**OPTIONS, "seed": SEED + i})
        assert row["messages"] == [*PROMPTS[i], {"role": "assistant", "content": alone.text}]
        assert row["finish"] == ("stop" if alone.tokens[-1] == 256 else "length")
    assert {row["finish"] for row in rows} == {"stop", "length"}


@pytest.mark.parametrize("batch_size", [1, 3])
def test_answers_do_not_depend_on_the_batch_size(
    params, source, whole, tmp_path, batch_size
) -> None:
    summary = answer_file(params, source, tmp_path / "out.jsonl", batch_size=batch_size, **OPTIONS)
    assert records(tmp_path / "out.jsonl") == records(whole)
    counts = {"prompts": 6, "answered": 5, "already_answered": 0, "too_long": 1}
    assert {key: summary[key] for key in counts} == counts
    assert summary["new_tokens"] > 5 and summary["tau"] >= 1


@pytest.mark.parametrize("cut", [1, 14, 60])
def test_a_killed_run_resumes(params, source, whole, tmp_path, cut) -> None:
    """Catches a half line kept, a prompt lost with it, and one answered twice."""
    lines = whole.read_bytes().splitlines(keepends=True)
    path = tmp_path / "out.jsonl"
    path.write_bytes(b"".join(lines[:2]) + lines[2][:cut])
    summary = answer_file(params, source, path, batch_size=2, **OPTIONS)
    assert (summary["answered"], summary["already_answered"]) == (3, 2)
    assert records(path) == records(whole)
    assert path.read_bytes().startswith(b"".join(lines[:2]))
    finished = path.read_bytes()
    assert answer_file(params, source, path, **OPTIONS)["answered"] == 0
    assert path.read_bytes() == finished


@pytest.mark.parametrize(
    "foreign",
    [
        b'{"messages": []}\n',
        b"a shopping list\n",
        b"[1, 2]",  # no line break: it was once taken for a torn line and cut to nothing
        b"\xff\xfe\n",
        b'{"index": 0, "messages": [{"role": "user", "content": "other"}, {}]}\n',
    ],
)
def test_a_foreign_output_file_is_left_alone(params, source, tmp_path, foreign) -> None:
    """Catches answers appended to, or cut from, a file of somebody else's or of another input."""
    path = tmp_path / "mine.jsonl"
    path.write_bytes(foreign)
    said = f"output={str(path)!r}: holds no answers to this input with these settings; give"
    with pytest.raises(ValueError, match=re.escape(said)):
        answer_file(params, source, path, **OPTIONS)
    assert path.read_bytes() == foreign


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", ":2: not JSON ("),
        ('{"text": "x"}', ':2: no "messages"; write {"messages": [...]} on every line'),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', ":2: no user message to answer"),
        ('{"messages": [{"role": "bot", "content": "x"}]}', ":2: messages[0].role='bot': must be"),
    ],
)
def test_a_malformed_line_is_named(params, source, tmp_path, line, said) -> None:
    bad, out = tmp_path / "bad.jsonl", tmp_path / "out.jsonl"
    bad.write_text(json.dumps({"messages": PROMPTS[1]}) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=re.escape(f"{bad}{said}")) as info:
        answer_file(params, bad, out, **OPTIONS)
    assert "\n" not in str(info.value) and not out.exists()
    # What lies beyond the limit is not read.
    assert answer_file(params, bad, out, limit=1, batch_size=1, **OPTIONS)["answered"] == 1


def test_the_command_line(tiny_model, source, whole, tmp_path, capsys) -> None:
    """One line of JSON; the limit counts prompts, and a later run without it adds the others."""
    out = tmp_path / "out.jsonl"
    argv = ["--model", str(tiny_model), "--input", str(source), "--output", str(out)]
    argv += ["--max-new-tokens", str(NEW), "--temperature", "1", "--seed", str(SEED)]
    main([*argv, "--batch-size", "2", "--limit", "3"])
    summary = json.loads(capsys.readouterr().out)
    assert (summary["prompts"], summary["answered"]) == (3, 3)
    assert records(out) == records(whole)[:3]
    main([*argv, "--batch-size", "2"])
    assert json.loads(capsys.readouterr().out)["already_answered"] == 3
    assert records(out) == records(whole)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_size": 0}, "batch_size=0: must be a whole number above 0"),
        ({"limit": 0}, "limit=0: must be a whole number above 0"),
        ({"raw": True}, "raw=True: a file of conversations"),
        ({"exact": True}, "exact=True: prompts of a file are"),
    ],
)
def test_errors(params, source, tmp_path, options, said) -> None:
    with pytest.raises(ValueError, match=said):
        answer_file(params, source, tmp_path / "out.jsonl", **OPTIONS | options)


@pytest.mark.parametrize("changed", [{"temperature": 0.0}, {"seed": SEED + 1}])
def test_other_settings_do_not_mix(params, source, whole, tmp_path, changed) -> None:
    """Catches a resume that continues a file with answers of another kind."""
    path = tmp_path / "answers.jsonl"
    path.write_bytes(whole.read_bytes())
    with pytest.raises(ValueError, match="with these settings"):
        answer_file(params, source, path, batch_size=2, **OPTIONS | changed)
    assert path.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"seed": -1}, {"max_new_tokens": 10**6}])
def test_bad_settings_leave_no_file(params, source, tmp_path, bad) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        answer_file(params, source, tmp_path / "answers.jsonl", **OPTIONS | bad)
    assert not (tmp_path / "answers.jsonl").exists()


def test_lines_with_settings_of_their_own(params, tmp_path) -> None:
    """Catches a line that is answered with another's settings, text behind a stop string, and a
    resumed file whose lines were made with other settings."""
    own: list[dict[str, Any]] = [
        {"temperature": 0},
        {},
        {"repetition_penalty": 1.5, "seed": 99, "logprobs": 1},
        {"stop": ["e", "a"], "min_tokens": 4},
    ]
    source, path = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"

    def write() -> None:
        lines = [{"messages": ask, "sampling": x} for ask, x in zip(PROMPTS[:4], own, strict=True)]
        source.write_text("\n".join(map(json.dumps, lines)) + "\n")

    write()
    answer_file(params, source, path, batch_size=3, **OPTIONS)
    shared = SamplingParams(temperature=1.0)
    for i, row in enumerate(records(path)):
        sampling = dataclasses.replace(shared, seed=SEED + i).override(own[i])
        alone = generate(params, PROMPTS[i], sampling=sampling, max_new_tokens=NEW)
        assert row["messages"][-1]["content"] == alone.text
        assert row["finish"] == alone.finish
        assert row["settings"]["sampling"] == sampling.to_dict()
        assert ("logprobs" in row) == ("logprobs" in own[i])
        if "logprobs" in row:
            assert [one["token"] for one in row["logprobs"]] == alone.tokens.tolist()
    before = path.read_bytes()
    assert answer_file(params, source, path, **OPTIONS)["already_answered"] == 4
    own[2]["repetition_penalty"] = 1.4
    write()
    with pytest.raises(ValueError, match="with these settings.*'repetition_penalty': 1.5"):
        answer_file(params, source, path, **OPTIONS)
    # A line beyond the limit has settings that are not looked at.
    assert answer_file(params, source, path, limit=2, **OPTIONS)["already_answered"] == 2
    assert path.read_bytes() == before
    for wrong, said in (
        ({"topp": 1}, ":4: sampling: unknown setting 'topp'; use temperature"),
        ({"top_p": "x"}, ":4: top_p='x': must be a number"),
        ([], ":4: sampling=[]: must be an object of settings"),
        ({"logit_bias": {"99999": 1}}, ":4: logit_bias: token id 99999 is outside"),
    ):
        own[3] = wrong  # type: ignore[assignment]
        write()
        with pytest.raises(ValueError, match=re.escape(f"{source}{said}")):
            answer_file(params, source, tmp_path / "other.jsonl", **OPTIONS)
