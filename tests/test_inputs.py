"""Damaged input files: each either loads or is refused in one line, never a traceback or a hang."""

import functools
import gzip
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest

import eagle_jax
from eagle_jax.checkpoint import files, hf, manifest
from eagle_jax.decode import tuning_store
from eagle_jax.evaluate.samples import SAMPLES, Samples
from eagle_jax.evaluate.tasks import read_tasks
from eagle_jax.params import check_tokenizers
from eagle_jax.text import Tokenizer, read_conversations, read_prompts
from eagle_jax.train import metrics, offline

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
    """What `load` does with the files of a model, but for placing weights, and a prompt."""
    config, _ = hf.open_target(model / "target")
    tokenizer = Tokenizer.load(model / "target")
    for token in tokenizer.eos_ids:
        assert type(token) is int and 0 <= token < config.vocab_size
    tokenizer.chat([{"role": "user", "content": "Hi"}])
    for directory in sorted(model.iterdir()):
        if directory.name != "target":
            hf.kind(directory)
            hf.check_fit(config, hf.open_draft(directory, config)[0], directory)


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
    eagle_jax.load(model)
    refuses_in_one_line(lambda: use(model), model / name)


def test_tokenizer_json_of_a_draft(tiny_model, tmp_path) -> None:
    """It is compared with the target's token by token, without the tokenizers package."""
    shutil.copy(tiny_model / "target" / "tokenizer.json", tmp_path)
    compare = functools.partial(check_tokenizers, tiny_model / "target", tmp_path)
    refuses_in_one_line(compare, tmp_path / "tokenizer.json", ("model",))


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


def test_manifest_of_a_model(tmp_path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "config.json").write_text("{}")
    manifest.write_manifest(tmp_path, {"target": "target"})
    path = tmp_path / manifest.MANIFEST
    below = [("parts",), ("parts", "target"), ("parts", "target", "files", "config.json")]
    refuses_in_one_line(lambda: manifest.check(tmp_path), path, *below)


def test_index_of_shards(model) -> None:
    target = model / "target"
    name = "model-00001-of-00001.safetensors"
    (target / "model.safetensors").rename(target / name)
    index = target / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    use(model)
    refuses_in_one_line(lambda: files.read_tensors(target), index, ("weight_map",))


def test_tuning(tmp_path) -> None:
    path = tmp_path / "tuning.json"
    entry = {"key": {"rows": 1}, "method": "--method vanilla", "tuned": "2026"}
    content = {"format": "eagle_jax tuning", "version": 1, "entries": [entry]}
    path.write_text(json.dumps(content))
    refuses_in_one_line(lambda: tuning_store.entries(path), path)


def test_manifest_of_features(tmp_path) -> None:
    path = tmp_path / offline.MANIFEST
    made = {
        "format": offline.FORMAT,
        "sequence_length": 48,
        "text": "a",
        "rows": 10,
        "rows_per_file": 4,
        "weights": "b",
        "target": {"hidden_size": 8},
        "layers": [1, 2],
        "dtype": "int8",
        "compute_dtype": "float32",
    }
    path.write_text(json.dumps(made))

    def compare() -> None:
        found = offline.read_manifest(path)
        if not offline.differences(found, made):
            offline.paths(tmp_path, found)

    refuses_in_one_line(compare, path)


RUN = {
    "key": json.dumps(["run", "own", ["1"], 0, 0.0, 5, "vanilla", 0]),
    "new_tokens": [3],
    "rounds": [3],
    "accepted": [],
    "compile": 0.0,
    "prefill": 0.1,
    "decode": 0.2,
    "tokens": [[1, 2, 3]],
}


def test_samples_of_an_evaluation(tmp_path) -> None:
    """A damaged line is refused before anything is measured, not when tables are made."""
    samples = Samples(tmp_path, {"seed": 0})
    samples.add(RUN["key"], {k: v for k, v in RUN.items() if k != "key"})
    samples.close()
    path = tmp_path / SAMPLES
    whole = path.read_bytes()
    Samples(tmp_path, {"seed": 0}).close()
    header = whole.splitlines(keepends=True)[0]
    for key, value, text in mutations(RUN):
        seconds = key in ("compile", "prefill", "decode") and value in (2**32 + 5, 1.5)
        if key == "unknown_key" or seconds or (key, value) == ("tokens", [[1]]):
            continue
        path.write_bytes(header + text.encode() + b"\n")
        with pytest.raises(ValueError, match="samples.jsonl is damaged or not ours"):
            Samples(tmp_path, {"seed": 0})
    for data in BYTES[1:]:
        path.write_bytes(header + data + b"\n")
        with pytest.raises(ValueError, match="samples.jsonl is damaged or not ours"):
            Samples(tmp_path, {"seed": 0})


def test_trace_of_a_run(tmp_path) -> None:
    """A trace ends at its first damaged line: what follows belongs to steps that are done again."""
    path = tmp_path / metrics.TRACE
    good = json.dumps({"step": 1, "loss": 2.0})
    for data in [*BYTES, b'{"step": "1", "loss": 1}', b'{"step": 2}', b'{"step": 2, "loss": "a"}']:
        path.write_bytes(good.encode() + b"\n" + data + b"\n" + good.encode() + b"\n")
        assert metrics.read_trace(path) == [{"step": 1, "loss": 2.0}]
        metrics.Trace(path, 1).close()
        assert path.read_text() == good + "\n"


LINES = [
    b'{"messages": 5}',
    b'{"messages": [5]}',
    b'{"messages": [[]]}',
    b'{"messages": {"role": "user"}}',
    b'{"messages": [{"role": ["user"], "content": "a"}]}',
    b'{"messages": [{"role": "user", "content": ["a"]}]}',
    b'{"messages": [{"role": "user", "content": null}]}',
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"messages": [{"role": 1e999, "content": NaN}]}',
    *BYTES[1:-1],
]
QUESTIONS = [
    b'{"turns": 5}',
    b'{"turns": [5]}',
    b'{"turns": "a"}',
    b'{"turns": [[]]}',
    *BYTES[1:-1],
]


@pytest.mark.parametrize("name", ["q.jsonl", "q.jsonl.gz"])
def test_lines_with_wrong_types(name, tmp_path) -> None:
    def write(data: bytes) -> None:
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)

    for data in LINES:
        write(data + b"\n")
        for read in (read_conversations, read_prompts):
            with pytest.raises(ValueError, match=f"{name}:1: ") as info:
                list(read(tmp_path / name))
            assert "\n" not in str(info.value)
    for data in QUESTIONS:
        write(data + b"\n")
        with pytest.raises(ValueError, match=f"{name}:1: ") as info:
            read_tasks(["q"], str(tmp_path))
        assert "\n" not in str(info.value)
