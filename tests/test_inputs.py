"""Damaged input files: each either loads or is refused in one line, never a traceback or a hang."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest

import eagle_jax

WRONG: list[Any] = [None, True, -1, 2**32 + 5, 1.5, float("nan"), "5", [[1]], {"a": 1}]


def mutations(content: dict[str, Any], deeper: tuple[str, ...] = ()):
    """A copy of `content` with each key, or each key below `deeper`, replaced by wrong values."""
    inner = content
    for name in deeper:
        inner = inner[name]
    for key in [*inner, *(["unknown_key"] if not deeper else [])]:
        for value in WRONG:
            copy = json.loads(json.dumps(content))
            place = copy
            for name in deeper:
                place = place[name]
            place[key] = value
            yield ".".join((*deeper, key)), value, json.dumps(copy)
        if key in inner:
            copy = json.loads(json.dumps(content))
            place = copy
            for name in deeper:
                place = place[name]
            del place[key]
            yield ".".join((*deeper, key)), "deleted", json.dumps(copy)


BYTES = [
    b"",
    b"\0\0\0\0",
    b"{",
    b"[]",
    b"null",
    b"5",
    b'"text"',
    b"\xff\xfe{\0}\0",
    b"[" * 100_000,
    b'{"vocab_size": ' + b"9" * 5000 + b"}",
    b'{"model_type": "\\ud800"}',
    b"{} {}",
    b"NaN",
]


def attempts(path: Path, *deeper: tuple[str, ...]):
    """Name and content of every damaged version of a JSON file."""
    content = json.loads(path.read_text())
    for below in ((), *deeper):
        for key, value, text in mutations(content, below):
            yield f"{key}={value!r}", text.encode()
    for data in BYTES:
        yield repr(data[:20]), data
    whole = path.read_bytes()
    yield "cut", whole[: len(whole) // 2]
    yield "NUL inside", whole[: len(whole) // 2] + b"\0" + whole[len(whole) // 2 :]


def refuses_in_one_line(use, path: Path, *deeper: tuple[str, ...]) -> tuple[int, int]:
    """Calls `use` with every damaged version of `path`; how many passed and were refused."""
    whole, passed, refused = path.read_bytes(), 0, 0
    bad = []
    try:
        for name, data in attempts(path, *deeper):
            path.write_bytes(data)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)
                    use()
                passed += 1
            except ValueError as error:
                refused += 1
                if not str(error) or "\n" in str(error) or len(str(error)) > 1000:
                    bad.append(f"{name}: {str(error)[:200]!r}")
            except Exception as error:
                bad.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
    finally:
        path.write_bytes(whole)
    assert not bad, "\n" + "\n".join(bad)
    assert refused > len(BYTES) // 2
    return passed, refused


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path, request) -> Path:
    """A target, and of the drafts only the one whose file is damaged: loading takes the time."""
    copy = tmp_path / "model"
    name = request.node.callspec.params["name"] if hasattr(request.node, "callspec") else ""
    for part in {"target", name.partition("/")[0] or "target"}:
        shutil.copytree(tiny_model / part, copy / part)
    generation = copy / "target" / "generation_config.json"
    if not generation.exists():
        generation.write_text(json.dumps({"eos_token_id": 256, "bos_token_id": 1}))
    return copy


def use(model: Path) -> None:
    """What every program does with a model: load it, and write a prompt in its format."""
    params = eagle_jax.load(model)
    assert params.tokenizer is not None
    for token in params.tokenizer.eos_ids:
        assert type(token) is int and 0 <= token < params.target_config.vocab_size
    params.tokenizer.chat([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize(
    "name",
    [
        "target/config.json",
        "target/generation_config.json",
        "target/tokenizer_config.json",
        "eagle/config.json",
        "eagle3/config.json",
        "medusa/config.json",
        "model/config.json",
    ],
)
def test_json_files_of_a_model(model, name) -> None:
    use(model)
    refuses_in_one_line(lambda: use(model), model / name)


def test_tokenizer_json(model) -> None:
    path = model / "target" / "tokenizer.json"
    refuses_in_one_line(lambda: use(model), path, ("model",))


def test_rope_scaling_of_a_config(model) -> None:
    path = model / "target" / "config.json"
    whole = path.read_bytes()
    content = json.loads(whole)
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    try:
        path.write_text(json.dumps({**content, "rope_scaling": scaling}))
        refuses_in_one_line(lambda: use(model), path, ("rope_scaling",))
    finally:
        path.write_bytes(whole)
