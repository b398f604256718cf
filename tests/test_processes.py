"""Two processes with four devices each do what one with eight does."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import gloo
import jax
import numpy as np
import pytest
import tiny_pair
import tiny_run

import eagle_jax
from eagle_jax import sharding
from eagle_jax.decode import generate
from eagle_jax.settings import override
from eagle_jax.train import loop

ROOT = Path(__file__).parent.parent
STEPS, CUT = 50, 20
CONFIG = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from tiny_run import draft_run
from eagle_jax.settings import override
config = override(draft_run(Path({folder!r}), {target!r}, steps={steps}), {changes!r})
"""
# A chat, ids, and rows that are no multiple of the groups.
DECODE = """
import json, sys
import eagle_jax
from eagle_jax import distributed, sharding
import argparse
parser = argparse.ArgumentParser()
distributed.add_arguments(parser)
distributed.join(parser.parse_args(sys.argv[2:]))
params = eagle_jax.load(sys.argv[1], sharding=sharding.make_mesh(tensor=2))
for temperature in (0.0, 1.0):
    out = eagle_jax.decode.generate(
        params, [[1, 2, 3], [40, 50], [9], [7, 8]], method="eagle", max_new_tokens=24,
        temperature=temperature, seed=4,
    )
    if distributed.first():
        print(json.dumps([row.tolist() for row in out.tokens]))
"""
SIGTERM = """
import argparse, os, signal, socket
from eagle_jax import distributed
with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
parser = argparse.ArgumentParser()
distributed.add_arguments(parser)
words = ["--coordinator", f"localhost:{{port}}", "--processes", "1", "--process", "0"]
distributed.join(parser.parse_args(words), preemptible={preemptible})
os.kill(os.getpid(), signal.SIGTERM)
"""


def together(*command: str) -> str:
    """Runs a command in two processes; returns what the first printed."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = dict(os.environ, XLA_FLAGS="--xla_force_host_platform_device_count=4")
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    meet = ["--coordinator", f"localhost:{port}", "--processes", "2", "--process"]
    running = [
        subprocess.Popen(
            [sys.executable, *command, *meet, str(rank)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=300) for process in running]
    finally:
        for process in running:
            process.kill()
    for process, (_, error) in zip(running, said, strict=True):
        assert process.returncode == 0, error[-3000:]
    first, second = (gloo.silenced(out) for out, _ in said)
    assert not second, "the second process printed"
    assert "step" not in said[1][1], "the second process showed its progress"
    return first


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_pair.write(tmp_path_factory.mktemp("model"))


def losses(folder: Path) -> np.ndarray:
    lines = map(json.loads, (folder / "draft/metrics.jsonl").read_text().splitlines())
    return np.array([line["loss"] for line in lines if "loss" in line])


def train(folder: Path, model: Path, changes: list[str], steps: int = STEPS) -> str:
    """The command line, in two processes."""
    folder.mkdir(exist_ok=True)
    # Text and tokenizer are there before both look for them.
    tiny_run.draft_run(folder, str(model / "target"))
    names = {"tests": str(ROOT / "tests"), "folder": str(folder), "target": str(model / "target")}
    (folder / "config.py").write_text(CONFIG.format(**names, steps=steps, changes=changes))
    return together("-m", "eagle_jax.train", "--config", str(folder / "config.py"))


def test_training_is_the_same(model, tmp_path):
    """Catches rows that both read or none does, noise that differs, and a step cut in two.

    And a run that two processes began is finished by one on other devices.
    """
    changes = ["fsdp=2", "tensor=2", "optim.schedule='constant'"]
    one = tmp_path / "one"
    one.mkdir()
    config = override(tiny_run.draft_run(one, str(model / "target"), steps=STEPS), changes)
    loop.run(config)
    expected = losses(one)
    assert len(expected) == STEPS

    two = tmp_path / "two"
    result = json.loads(train(two, model, changes, CUT).splitlines()[-1])
    assert result["steps"] == CUT and result["device"] == "8 x cpu"
    np.testing.assert_allclose(losses(two), expected[:CUT], rtol=1e-5)
    assert (two / "draft/export/model.safetensors").is_file()

    config = override(tiny_run.draft_run(two, str(model / "target"), steps=STEPS), changes)
    loop.run(dataclasses.replace(config, fsdp=8, tensor=1))
    np.testing.assert_allclose(losses(two), expected, rtol=1e-5)


def test_decoding_is_the_same(model, tmp_path):
    program = tmp_path / "decode.py"
    program.write_text(DECODE)
    said = together(str(program), str(model)).splitlines()
    params = eagle_jax.load(model, sharding=sharding.make_mesh(tensor=2))
    alone = eagle_jax.load(model)
    assert len(jax.devices()) == 8
    for temperature, line in zip((0.0, 1.0), said, strict=True):
        for each in (params, alone):
            out = generate(
                each,
                [[1, 2, 3], [40, 50], [9], [7, 8]],
                method="eagle",
                max_new_tokens=24,
                temperature=temperature,
                seed=4,
            )
            assert json.loads(line) == [row.tolist() for row in out.tokens]


def test_an_answer_file_has_one_writer(model, tmp_path):
    """Catches a line that both write, and a run that goes on where only one of them was."""
    prompts = [{"messages": [{"role": "user", "content": "a" * n}]} for n in range(1, 6)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    arguments = ["-m", "eagle_jax.decode", "--model", str(model), "--input"]
    arguments += [str(tmp_path / "prompts.jsonl"), "--max-new-tokens", "12", "--temperature", "1"]
    both = [
        *arguments,
        "--output",
        str(tmp_path / "two.jsonl"),
        "--tensor",
        "2",
        "--batch-size",
        "4",
    ]
    assert json.loads(together(*both))["answered"] == 5
    again = json.loads(together(*both))
    assert again["answered"] == 0 and again["already_answered"] == 5
    one = [sys.executable, *arguments, "--output", str(tmp_path / "one.jsonl")]
    subprocess.run(one, check=True, capture_output=True, cwd=ROOT)
    lines = [
        sorted((tmp_path / name).read_text().splitlines()) for name in ("one.jsonl", "two.jsonl")
    ]
    assert lines[0] == lines[1] and len(lines[0]) == 5


@pytest.mark.parametrize(("preemptible", "status"), [(False, -signal.SIGTERM), (True, 0)])
def test_sigterm_ends_what_does_not_ask_for_it(preemptible, status):
    """Catches JAX's runtime hearing it, and a server or an evaluation that nobody can end."""
    command = [sys.executable, "-c", SIGTERM.format(preemptible=preemptible)]
    assert subprocess.run(command, cwd=ROOT).returncode == status


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--processes", "2"], "--coordinator: missing; give --coordinator, --processes and"),
        (
            ["--coordinator", "localhost:1", "--processes", "2", "--process", "2"],
            "--process=2: must be 0 to 1, below --processes=2",
        ),
        (["--distributed", "--process", "0"], "--distributed: finds --process by itself"),
    ],
)
def test_bad_arguments_are_one_line(arguments, said):
    command = [sys.executable, "-m", "eagle_jax.train", "--config", "none.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {said}"), done.stderr
    assert done.stderr.count("\n") == 1


def test_a_launcher_without_the_flag_is_pointed_out(capsys, monkeypatch):
    import argparse

    from eagle_jax import distributed

    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    parser = argparse.ArgumentParser()
    distributed.add_arguments(parser)
    distributed.join(parser.parse_args([]))
    assert "add --distributed" in capsys.readouterr().err
