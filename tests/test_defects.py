"""Mistakes of users that were once answered badly, one test per line of the list of defects.

The number in a test's name is that of the defect. Each test fails on the code before its mend.
"""

import dataclasses
import fcntl
import json
import re
import shutil
from pathlib import Path

import decoding
import jax
import numpy as np
import pytest

import eagle_jax
from eagle_jax import outputs
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
from eagle_jax.decode.batching.answer_file import answer_file
from eagle_jax.decode.session import Options
from eagle_jax.drafters.medusa.method import Medusa
from eagle_jax.params import Params

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
    with outputs.locked_directory("output_dir", tmp_path):
        assert (tmp_path / ".lock").exists()
        with pytest.raises(ValueError, match="another process is writing there"):
            with outputs.locked_directory("output_dir", tmp_path):
                pass
    assert not (tmp_path / ".lock").exists()
    (tmp_path / ".lock").touch()  # as a killed process leaves it
    with outputs.locked_directory("output_dir", tmp_path):
        pass


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
        Options(method).check(decoding.random_pair())
    Options(Eagle(chain(64))).check(decoding.random_pair())
    # A copied chain is one gather, however long it is.
    Options(PromptLookup(length=1000)).check(decoding.random_pair())


def test_14_output_must_be_a_regular_file(params, source, tmp_path, monkeypatch) -> None:
    """Catches a device read until memory ends, and a run that ends in an error after decoding."""
    import os

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
