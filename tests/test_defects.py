"""Mistakes of users that were once answered badly, one test per line of the list of defects.

The number in a test's name is that of the defect. Each test fails on the code before its mend.
"""

import contextlib
import dataclasses
import errno
import fcntl
import functools
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import decoding
import jax
import numpy as np
import pytest
import tiny_run

import eagle_jax
from eagle_jax import checks, outputs, settings, sharding
from eagle_jax.checkpoint import files
from eagle_jax.config import OptimConfig
from eagle_jax.decode import (
    Batcher,
    Eagle,
    PromptLookup,
    Recycling,
    Speculative,
    Typical,
    chain,
    executables,
    generate,
    stream,
)
from eagle_jax.decode.batching import answer_file as answers
from eagle_jax.decode.batching.answer_file import answer_file
from eagle_jax.decode.sampling.params import SamplingParams
from eagle_jax.decode.session import check_method
from eagle_jax.drafters.medusa.method import Medusa
from eagle_jax.evaluate import EvalConfig
from eagle_jax.evaluate.__main__ import evaluate
from eagle_jax.evaluate.samples import Samples
from eagle_jax.params import Params
from eagle_jax.text import Tokenizer, read_prompts
from eagle_jax.train import data, loop
from eagle_jax.train.metrics import Trace

ASKED = [[{"role": "user", "content": text}] for text in ("Hi", "0+1", "abc")]


@pytest.fixture(scope="module")
def params(tiny_model: Path) -> Params:
    return eagle_jax.load(tiny_model)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"messages": ask}) + "\n" for ask in ASKED))
    return path


def answer(params: Params, source: Path, target: Path, **options) -> dict:
    defaults = {"batch_size": 2, "max_new_tokens": 4, "method": "vanilla"}
    return answer_file(params, source, target, **defaults | options)


def one_line(function, *args, **options) -> str:
    """The message of the ValueError or TypeError that a call must raise."""
    with pytest.raises((ValueError, TypeError)) as info:
        function(*args, **options)
    said = str(info.value)
    assert said and "\n" not in said and len(said) < 500
    return said


def test_01_answers_of_another_model_are_not_continued(params, source, tmp_path) -> None:
    """Catches `already_answered: 3` for another model, dtype or lossy rule."""
    path = tmp_path / "out.jsonl"
    assert answer(params, source, path)["answered"] == 3
    assert answer(params, source, path, method="eagle")["already_answered"] == 3
    before = path.read_bytes()
    other = tmp_path / "other"
    assert params.directory is not None
    shutil.copytree(params.directory, other)
    weights = other / "target" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    said = one_line(answer, dataclasses.replace(params, directory=other), source, path)
    assert re.search(
        r"with these settings: model is '\w+' there and '\w+' here; give another", said
    )
    halved = {name: x.astype(jax.numpy.bfloat16) for name, x in params.target.items()}
    said = one_line(answer, dataclasses.replace(params, target=halved), source, path)
    assert "dtype is 'float32' there and 'bfloat16' here" in said
    lossy = Medusa(chain(1), rule=Typical())
    assert "method is None there and '--method medusa" in one_line(
        answer, params, source, path, method=lossy
    )
    assert path.read_bytes() == before
    # The same model at another place, or with another draft, is the same model.
    shutil.copytree(params.directory, tmp_path / "moved")
    moved = dataclasses.replace(params, directory=tmp_path / "moved", drafts={})
    assert answer(moved, source, path)["already_answered"] == 3


def _batcher() -> Batcher:
    batcher = Batcher(
        decoding.trained_pair(),
        method="vanilla",
        rows=3,
        max_prompt=100,
        max_new_tokens=20,
        chunk=2,
    )
    for seed, prompt in enumerate(([7], [3, 9], [1, 2, 3], [4])):
        batcher.submit(prompt, seed=seed, max_new_tokens=5)
    return batcher


def _joined(pieces) -> dict[int, list[int]]:
    out: dict[int, list[int]] = {}
    for piece in pieces:
        out.setdefault(piece.request, []).extend(piece.tokens.tolist())
    return out


def test_02_pieces_that_were_not_handed_out_are_kept() -> None:
    """Catches texts that lose the rest of a chunk when a loop over `run` stops early."""
    whole = _joined(_batcher().run())
    assert [len(tokens) for tokens in whole.values()] == [5] * 4
    for go_on in (Batcher.run, lambda batcher: [*batcher.step(), *batcher.run()]):
        batcher, pieces = _batcher(), []
        for _ in range(2):
            run = batcher.run()
            pieces.append(next(run))
            run.close()
        pieces += go_on(batcher)
        assert _joined(pieces) == whole
        assert batcher.step() == []
    # What was cancelled is not handed out any more, though it was decoded.
    batcher = _batcher()
    run = batcher.run()
    first = next(run).request
    assert batcher.cancel(1)
    pieces = list(run)
    assert first == 0 and {piece.request for piece in pieces} == {0, 2, 3}
    assert not batcher.cancel(0)


WRONG_IDS = ["5", 5.0, 4294967301, -1, True, [[5]], ["5"], [True], [5, 1e9], {"a": 1}]


@pytest.mark.parametrize("ids", WRONG_IDS, ids=repr)
def test_03_end_tokens_are_checked(ids, tiny_model, tmp_path) -> None:
    """Catches answers that never stop ("5"), a TypeError (5.0) and an OverflowError (2**32 + 5)."""
    shutil.copytree(tiny_model / "target", tmp_path / "target")
    path = tmp_path / "target" / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": ids}))
    said = one_line(Tokenizer.load, tmp_path / "target")
    assert "eos_token_id=" in said and "must be a token id, or a list of them, from 0 to" in said
    path.write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert Tokenizer.load(tmp_path / "target").eos_ids == (5, 6)


def test_04_two_processes_do_not_write_one_file(params, source, tmp_path) -> None:
    """Catches every line written twice, with exit status 0."""
    path = tmp_path / "out.jsonl"
    with path.open("a") as file:  # a lock belongs to an open file, as a process's does
        fcntl.flock(file, fcntl.LOCK_EX)
        said = one_line(answer, params, source, path)
    assert "out.jsonl': another process is writing there; wait for it" in said
    assert path.read_bytes() == b""
    assert answer(params, source, path)["answered"] == 3


def test_04_a_directory_has_one_writer(tmp_path) -> None:
    """Also catches a lock that outlives its process, and a lock file left behind."""
    for place in (tmp_path, tmp_path / "tuning.json"):
        with outputs.locked("output_dir", place):
            (lock,) = tmp_path.glob(".*lock")
            with pytest.raises(ValueError, match="another process is writing there"):
                with outputs.locked("output_dir", place):
                    pass
        assert not lock.exists()
        lock.touch()  # as a killed process leaves it
        with outputs.locked("output_dir", place):
            pass
        assert not lock.exists()


@contextlib.contextmanager
def _held(directory: Path):
    """The lock of a directory, as another process holds it."""
    directory.mkdir(parents=True, exist_ok=True)
    with outputs.locked("output_dir", directory):
        yield


def test_04_training_evaluation_and_conversion_lock_what_they_write(tmp_path, tiny_model) -> None:
    """Catches two runs that write one directory in turns, and delete each other's files."""
    run = tiny_run.target_run(tmp_path, steps=1)
    with _held(Path(run.output_dir)):
        said = one_line(loop.run, run)
    assert said.startswith(f"output_dir={run.output_dir!r}: another process is writing there")
    evaluation = EvalConfig(
        output_dir=str(tmp_path / "evaluation"), methods=(), model=str(tiny_model)
    )
    with _held(Path(evaluation.output_dir)):
        said = one_line(evaluate, evaluation, restart=True)
    assert said.startswith(f"output_dir={evaluation.output_dir!r}: another process is writing")
    with files.staged(tmp_path / "converted") as fresh:
        with pytest.raises(ValueError, match="output='.*converted': another process is writing"):
            with files.staged(tmp_path / "converted"):
                pass
        assert fresh.is_dir()


WRONG_RUNS = {
    "output_dir": (["output_dir="], "output_dir='': is no name of a directory; give one"),
    "cache_dir": (["data.cache_dir="], "data.cache_dir='': is no name of a directory"),
    "clip_value": (["optim.clip_value=-1"], "optim.clip_value=-1.0: must be a number above 0, or"),
    "clip_norm": (["optim.clip_norm=0"], "optim.clip_norm=0.0: must be a number above 0, or None"),
    "seed": (["seed=-1"], "seed=-1: must be a whole number from 0 to 4294967295"),
    "seed, huge": (["seed=99999999999999999999"], "seed=99999999999999999999: must be a whole"),
    "data.seed": (["data.seed=-1"], "data.seed=-1: must be a whole number from 0 to 4294967295"),
    "rate": (["optim.learning_rate=0"], "optim.learning_rate=0.0: must be a number above 0"),
    "rate, huge": (["optim.learning_rate=1e300"], "optim.learning_rate=1e+300: must be a number"),
    "steps": (["optim.steps=0"], "optim.steps=0: must be a whole number from 1 to 2147483647"),
    "steps, huge": (["optim.steps=3000000000"], "optim.steps=3000000000: must be a whole number"),
    "warmup": (["optim.warmup_steps=-1"], "optim.warmup_steps=-1: must be a whole number"),
    "b1": (["optim.b1=1"], "optim.b1=1.0: must be a number from 0 and below 1"),
    "eps": (["optim.eps=0"], "optim.eps=0.0: must be a number above 0"),
    "decay": (["optim.weight_decay=-1"], "optim.weight_decay=-1.0: must be a number from 0"),
    "eval_every": (["eval_every=-1"], "eval_every=-1: must be a whole number of at least 0"),
    "tensor": (["tensor=-1"], "tensor=-1: must be a whole number above 0"),
    "fsdp": (["fsdp=0"], "fsdp=0: must be a whole number above 0"),
    "peak": (["peak_flops=-1"], "peak_flops=-1.0: must be a number of at least 0"),
    "batch": (["data.batch_size=0"], "data.batch_size=0: must be a whole number above 0"),
}


@pytest.mark.parametrize("name", WRONG_RUNS)
def test_05_06_08_numbers_of_a_training_run(name, tmp_path, monkeypatch) -> None:
    """Catches files written into the current directory, numbers that mean nothing, and overflows.

    The list has 5 (an empty output_dir), 6 (clip_value, seed) and 8 (a seed of 20 digits).
    """
    overrides, said = WRONG_RUNS[name]
    monkeypatch.chdir(tmp_path)
    run = settings.override(tiny_run.target_run(tmp_path / "run"), overrides)
    before = sorted(tmp_path.rglob("*"))
    assert one_line(loop.run, run).startswith(said)
    assert sorted(tmp_path.rglob("*")) == before


HUGE = 10**400  # no float holds it, and `math.isfinite` raises OverflowError


def test_08_huge_whole_numbers_are_refused_everywhere() -> None:
    """Catches an OverflowError where a whole number is converted to float."""
    assert "must be a number" in one_line(checks.check_number, "x", HUGE)
    assert "must be a whole number" in one_line(checks.check_whole, "x", HUGE, 0, 5)
    assert "thousands of digits" in one_line(checks.check_whole, "x", 10**5000, 0, 5)
    assert "temperature=1000" in one_line(SamplingParams, temperature=HUGE)
    optim = OptimConfig(learning_rate=1e-3, steps=1)
    said = one_line(settings.override, optim, [f"learning_rate={HUGE}"])
    assert said.startswith("learning_rate=1000") and said.endswith("must be a finite number")


@pytest.mark.parametrize(("tensor", "expert"), [(-1, 1), (True, 1), (0, 0), (0, -2)])
def test_06_tensor_must_be_a_number_of_devices(tensor, expert) -> None:
    """Catches `--tensor -1`, which was taken for 1."""
    assert "must be a whole number" in one_line(sharding.decoding_mesh, tensor, expert)


def test_07_damaged_gzip_is_named(tmp_path) -> None:
    """Catches a `zlib.error`: damage in the middle is another error than a cut or a bad header."""
    lines = [json.dumps({"messages": ASKED[i % 3], "pad": i * i}) + "\n" for i in range(5000)]
    whole = bytearray(gzip.compress("".join(lines).encode()))
    path = tmp_path / "prompts.jsonl.gz"
    for start in range(len(whole) // 3, len(whole), len(whole) // 7):
        data = whole.copy()
        data[start : start + 40] = bytes(255 - x for x in data[start : start + 40])
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"prompts.jsonl.gz:\d+: (damaged gzip|not JSON)"):
            list(read_prompts(path))
    path.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="damaged gzip"):
        list(read_prompts(path))


WRONG_TOKENIZERS = [
    {"bos_token": 5},
    {"bos_token": {"content": 5}},
    {"eos_token": ["<|end|>"]},
    {"chat_template": 5},
    {"chat_template": [{"name": "default", "template": 5}]},
    {"chat_template": {"a": 1}},
]


@pytest.mark.parametrize("content", WRONG_TOKENIZERS, ids=repr)
def test_09_tokenizer_config_with_wrong_types(content, tiny_model, tmp_path) -> None:
    shutil.copytree(tiny_model / "target", tmp_path / "target")
    (tmp_path / "target" / "tokenizer_config.json").write_text(json.dumps(content))
    said = one_line(Tokenizer.load, tmp_path / "target")
    assert f"{next(iter(content))}=" in said
    assert "in tokenizer_config.json: must be a string; download the file again" in said


_CALLS = """
import sys
import eagle_jax
from eagle_jax.decode import Batcher, Eagle, generate, stream

model = sys.argv[1]
params = eagle_jax.load(model)


def said(function, *args, **options):
    try:
        function(*args, **options)
    except (ValueError, TypeError) as error:
        return str(error)
    return "nothing"


def check(start, function, *args, **options):
    found = said(function, *args, **options)
    if not found.startswith(start) or "\\n" in found or len(found) > 300:
        print(start, "|", args[1:], options, "|", found)


check("params: is a str of 'tiny'; give what eagle_jax.load(...) returns", generate, "tiny", "hi")
check("params: is a NoneType; give what", stream, None, "hi")
check("params: is a str", Batcher, model)
for value in (None, 3, b"tiny", ["tiny"], "a\\0b"):
    check("model=", eagle_jax.load, value)
for value in (5, [5], [None], {"a": 1}, b"eagle"):
    check("draft=", eagle_jax.load, model, draft=value)
for name, value in (
    ("dtype", 5), ("dtype", [1]), ("sharding", "all"), ("quantize", 8), ("quantize", ["int8"]),
    ("quantize_drafts", "int4"),
):
    check(name, eagle_jax.load, model, **{name: value})
for name, value in (
    ("raw", "no"), ("exact", 1), ("ignore_eos", None), ("max_new_tokens", "5"),
    ("max_new_tokens", 2.0), ("max_new_tokens", True), ("seed", "1"), ("seed", 1.5), ("seed", True),
    ("method", 5), ("method", Eagle), ("method", None),
):
    check(name, generate, params, "hi", **{name: value})
for value in (None, 5, {"role": "user"}, b"hi", [], "", [None], [1.5], [["a", 5]], [True]):
    check("prompt", generate, params, value)
for value in ([{"role": "user"}], [{"role": "user", "content": 5}], [{"role": 5, "content": ""}]):
    check("messages[0]", generate, params, value)
for value in (0, -1, 1.5, True, "4"):
    check("rounds_per_chunk", stream, params, "hi", rounds_per_chunk=value)
batcher = Batcher(params, rows=1, method="vanilla", max_prompt=16, max_new_tokens=4)
for name, value in (("seed", "1"), ("seed", True), ("raw", 1), ("max_new_tokens", "5")):
    check(name, batcher.submit, "hi", **{name: value})
"""


def test_10_wrong_types_say_the_remedy(tiny_model) -> None:
    """Catches tracebacks of AttributeError and TypeError from deep inside.

    In a process of its own: the tests' type checks would be faster than ours.
    """
    command = [sys.executable, "-W", "ignore", "-c", _CALLS, str(tiny_model)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("", 0), done.stderr


def test_12_decoding_inside_jit_says_so() -> None:
    """Catches an obscure error about shardings."""
    pair = decoding.trained_pair()
    said = "called inside jax.jit"

    def decode(seed):
        return generate(pair, [1, 2], method="vanilla", max_new_tokens=1).tokens

    with pytest.raises(ValueError, match=said):
        jax.jit(decode)(0)
    with pytest.raises(ValueError, match=said):
        jax.jit(lambda params: generate(params, [1, 2]).tokens)(pair)
    with pytest.raises(ValueError, match=said):
        jax.vmap(lambda ids: generate(pair, ids).tokens)(np.ones((2, 2), np.int32))
    with pytest.raises(ValueError, match=said):
        jax.jit(lambda x: Batcher(pair, rows=1) and x)(0)


LEVELS = {
    "chain": (Eagle(chain(1000)), "tree depth=1000: every level is compiled by itself"),
    "chain, little": (Eagle(chain(65)), "and at most 64 are allowed; use fewer"),
    "speculative": (Speculative(1000), "length=1000: every level is compiled by itself"),
    "recycling": (Recycling(chain(65)), "tree depth=65: every level is compiled by itself"),
    "speculative, bool": (Speculative(True), "length=True: must be a whole number"),
}


@pytest.mark.parametrize("name", LEVELS)
def test_13_a_draft_of_a_thousand_levels_is_refused(name) -> None:
    """Catches minutes of compilation: its time grows with the levels that a draft model runs."""
    method, said = LEVELS[name]
    with pytest.raises(ValueError, match=said):
        check_method(decoding.random_pair(), method, 1, 0.0)
    check_method(decoding.random_pair(), Eagle(chain(64)), 1, 0.0)
    # A copied chain is one gather, however long it is.
    check_method(decoding.random_pair(), PromptLookup(length=1000), 1, 0.0)


def test_14_output_must_be_a_regular_file(params, source, tmp_path) -> None:
    """Catches a device read until memory ends, and a run that ends in an error after decoding."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (Path("/dev/full"), Path("/dev/null"), fifo, tmp_path):
        said = one_line(answer, params, source, path)
        assert said == f"output={str(path)!r}: is not a regular file; give a file name"
    said = one_line(answer, params, source, tmp_path / "no" / "out.jsonl")
    assert said.endswith("no' is not a directory; create it first")
    assert "NUL byte" in one_line(answer, params, source, tmp_path / "a\0b")


def test_16_stream_refuses_a_batch_at_once(params) -> None:
    """Catches seconds of compilation before the message."""
    before = executables.executables()
    assert "stream takes one prompt" in one_line(stream, params, ["a", "b"])
    assert executables.executables() == before


def test_17_a_tree_given_by_its_name_is_named() -> None:
    """Catches "give a name or an instance", which is about the method."""
    said = one_line(Eagle, "chain-3")
    assert said == "tree='chain-3': is not a tree; give one such as named_tree('chain-3')"
    for method in (Medusa, Recycling):
        assert one_line(method, 3) == "tree=3: is not a tree; give one such as chain(3)"


def test_18_a_message_is_about_what_the_user_set(tiny_model, tmp_path) -> None:
    """Catches `longest_prompt=-98976`, which nobody set, and `error: None, line None`."""
    config = EvalConfig(
        output_dir=str(tmp_path / "out"),
        methods=(),
        model=str(tiny_model),
        new_tokens=100_000,
        temperatures=(0.0,),
    )
    said = one_line(evaluate, config)
    assert "every prompt is too long; new_tokens=100000 leaves 0 of the context's" in said
    path = tmp_path / "config.py"
    for content in (b"config = 5\0", b"\0", b"\xff\xfe\0"):
        path.write_bytes(content)
        said = one_line(settings.load, path, kind=EvalConfig)
        assert said.startswith(str(path)) and "None" not in said


def test_20_a_full_disk_is_told_with_the_file(params, source, tmp_path, monkeypatch) -> None:
    """Catches "No space left on device" alone: on which, and in which of many files?"""
    full = functools.partial(open, "/dev/full", "a")
    monkeypatch.setattr(answers, "_opened", lambda path: outputs.closing(full(), path))
    samples = Samples(tmp_path / "evaluation", {})
    samples._file.close()
    samples._file = full()
    trace = Trace(tmp_path / "metrics.jsonl", 0)
    trace._file.close()
    trace._file = full()
    for name, write in (
        ("out.jsonl", lambda: answer(params, source, tmp_path / "out.jsonl")),
        ("samples.jsonl", lambda: samples.add("a", {})),
        ("samples.jsonl", samples.close),
        ("metrics.jsonl", lambda: [trace.write({"step": 1}), trace.sync()]),
        ("metrics.jsonl", trace.close),
    ):
        with pytest.raises(OSError) as info:
            write()
        assert info.value.errno == errno.ENOSPC and Path(info.value.filename).name == name


def test_20_a_full_disk_of_prepared_text_is_told(tmp_path, monkeypatch) -> None:
    """Catches a RuntimeError of ArrayRecord with a traceback through four packages."""

    def full(*_) -> None:
        raise RuntimeError(f"Failed to finalize: write() failed: {os.strerror(errno.ENOSPC)}; at")

    config = tiny_run.target_run(tmp_path).data
    monkeypatch.setattr("eagle_jax.train.data.prepared.write_rows", full)
    said = one_line(data.prepare, config.train, config)
    assert said.startswith(f"data.cache_dir={config.cache_dir!r}: the prepared text cannot be")
    assert "(disk full); make room, or give another directory" in said
    assert not list(Path(config.cache_dir).glob("*"))


def test_07_damaged_prepared_text_is_named(tmp_path) -> None:
    """Catches a RuntimeError of ArrayRecord, and an AttributeError of tfds, in training."""
    config = tiny_run.target_run(tmp_path).data
    folder = data.prepare(config.train, config)
    (records,) = folder.rglob("*array_record*")
    whole = records.read_bytes()
    middle = len(whole) // 2
    for damaged in (b"", whole[:middle], whole[:middle] + bytes(200) + whole[middle + 200 :]):
        records.write_bytes(damaged)

        def read() -> None:
            rows = data.train_iterator(config)
            for _ in range(10):
                next(rows)

        said = one_line(read)
        assert said.startswith(f"cache_dir: {folder} is damaged (") and "delete it" in said
