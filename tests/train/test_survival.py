"""Training that survives: preemption, kills, damaged checkpoints, full disks, divergence."""

import asyncio
import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_run
from orbax.checkpoint._src.path import atomicity

from eagle_jax.checkpoint.train_state import Checkpoints, telling_full_disk
from eagle_jax.train import data, divergence, loop, metrics, objectives
from eagle_jax.train.data import prepared
from eagle_jax.train.preemption import Preemption
from eagle_jax.train.trainer import build

TESTS = Path(tiny_run.__file__).parent
ONE_DEVICE = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": f"{TESTS.parent}:{TESTS}"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def finished(folder):
    """A run that nothing happened to; its checkpoints are of steps 8 and 12."""
    config = tiny_run.target_run(folder)
    loop.run(config)
    return config


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of that run's configuration and files, to be damaged."""
    shutil.copytree(finished.output_dir, tmp_path / "run")
    return dataclasses.replace(finished, output_dir=str(tmp_path / "run"))


@pytest.fixture(scope="module")
def abstract(finished):
    return build(finished, objectives.build(finished)).abstract


def steps_of(config):
    return sorted(x.name for x in (Path(config.output_dir) / "checkpoints").iterdir())


def assert_same_run(one, two):
    for name in (metrics.TRACE, "export/model.safetensors"):
        first, second = (Path(x.output_dir) / name for x in (one, two))
        assert first.read_bytes() == second.read_bytes(), name


def at_step(monkeypatch, number, act):
    """Have `act` called when the metrics of a step are recorded: the next is in flight then."""
    record_step = metrics.Report.step

    def step(self, at, values):
        record_step(self, at, values)
        if at == number:
            act()

    monkeypatch.setattr(metrics.Report, "step", step)


# --- Kills and signals -----------------------------------------------------------------------


def test_twenty_kills(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(TESTS / "kill_loop.py"), str(tmp_path), "20"],
        capture_output=True,
        text=True,
        timeout=600,
        env=ONE_DEVICE,
    )
    assert done.returncode == 0, done.stderr
    whole, *killed, last = map(json.loads, done.stdout.splitlines())
    errors = (tmp_path / "stderr").read_text()
    assert whole["status"] == last["status"] == 0, errors
    assert [x["status"] for x in killed] == [-signal.SIGKILL] * 20, (killed, errors)
    assert {x["killed"].split()[0] for x in killed} > {"at"}  # at file operations and at times
    for before, after in zip(killed, killed[1:] + [last], strict=True):
        assert after["steps"][:1] in ([], [after["newest"]])  # it went on from the newest
        began = before["steps"][1:]  # all but the last of these were complete
        assert after["newest"] >= max([before["newest"], *began[:-1]])
    one, two = tmp_path / "whole", tmp_path / "killed"
    for name in (metrics.TRACE, "export/model.safetensors"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert len(metrics.read_trace(two / metrics.TRACE)) == 120
    left = [sorted(x.name for x in (run / "checkpoints").iterdir()) for run in (one, two)]
    assert left == [["117", "120"]] * 2  # nothing half written or half deleted stays


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_the_step_in_flight(number, finished, folder, monkeypatch, capfd):
    output = str(folder / f"signal_{number}")
    config = dataclasses.replace(finished, output_dir=output)
    handlers = [signal.getsignal(x) for x in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patched:
        at_step(patched, 5, lambda: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as stopped:
            loop.run(config)
    assert stopped.value.code == 128 + number
    assert steps_of(config) == ["4", "6"]
    assert f"{output}: {number.name}: step 6 is saved" in capfd.readouterr().err
    assert [signal.getsignal(x) for x in (signal.SIGTERM, signal.SIGINT)] == handlers
    loop.run(config)
    assert "resuming after step 6" in capfd.readouterr().err
    assert_same_run(config, finished)


@pytest.fixture
def interruptible():
    """Ctrl-C raises KeyboardInterrupt; the workers of a parallel test run ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_second_signal_acts_as_ever():
    with Preemption() as preemption:
        assert not preemption.reached(1)
        signal.raise_signal(signal.SIGINT)
        assert preemption.reached(2) and preemption.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_processes_agree_on_the_step(name):
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    body = f"""
        import os, signal, sys, time
        import jax
        rank = int(sys.argv[1])
        jax.distributed.initialize("localhost:{port}", 2, rank)
        from eagle_jax.train.preemption import Preemption
        with Preemption() as preemption:
            for step in range(1, 2000):
                time.sleep(0.01 * (1 + rank))
                if rank == 1 and step == 10:
                    os.kill(os.getpid(), signal.{name})
                if preemption.reached(step):
                    break
        print(jax.process_count(), step, preemption.signal)
    """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(body)]
    processes = [
        subprocess.Popen([*command, rank], stdout=subprocess.PIPE, text=True, env=ONE_DEVICE)
        for rank in "01"
    ]
    first, second = (process.communicate(timeout=120)[0].split() for process in processes)
    assert first == second and first[0] == "2"
    assert 10 < int(first[1]) < 1999 and first[2] == str(int(signal.SIGTERM))


# --- Checkpoints -----------------------------------------------------------------------------


def restored(config, abstract):
    checkpoints = Checkpoints(Path(config.output_dir) / "checkpoints", config)
    try:
        found = checkpoints.restore(abstract)
    finally:
        checkpoints.close()
    assert found is not None
    return found


def cut(file):
    os.truncate(file, 60)


def flip(file):
    content = bytearray(file.read_bytes())
    content[1000] ^= 0x55  # not in the middle: the file holds indices that are not read as well
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("pattern", "damage"),
    [
        ("_CHECKPOINT_METADATA", cut),
        ("_CHECKPOINT_METADATA", Path.unlink),
        ("state", shutil.rmtree),
        ("state/_METADATA", cut),
        ("state/manifest.ocdbt", Path.unlink),
        ("state/d/*", Path.unlink),
        ("state/ocdbt.process_0/d/*", cut),
        ("state/ocdbt.process_0/d/*", Path.unlink),
        # A changed byte is read without complaint: only the fingerprint tells.
        ("state/ocdbt.process_0/d/*", flip),
    ],
)
def test_damaged_checkpoint_is_set_aside(pattern, damage, copy, abstract, capfd):
    [file] = (Path(copy.output_dir) / "checkpoints" / "12").glob(pattern)
    damage(file)
    step, state, _ = restored(copy, abstract)
    assert step == int(state.step) == 8
    [line] = capfd.readouterr().err.splitlines()
    assert re.fullmatch(
        r"warning: .*/12: cannot be read \(.+\); renamed to 12.unreadable, going on from step 8",
        line,
    )
    assert steps_of(copy) == ["12.unreadable", "8"]


def test_any_file_cut_or_lost_changes_nothing_silently(copy, abstract):
    """Whatever is read is what was written."""
    _, state, position = restored(copy, abstract)
    wanted = jax.tree.map(np.asarray, state)
    step_folder = Path(copy.output_dir) / "checkpoints" / "12"
    spare = step_folder.parent.parent / "spare"
    shutil.copytree(step_folder, spare)
    for file in [x for x in spare.rglob("*") if x.is_file()]:
        for damage in (cut, Path.unlink):
            for leftover in step_folder.parent.glob("12*"):
                shutil.rmtree(leftover)
            shutil.copytree(spare, step_folder)
            damage(step_folder / file.relative_to(spare))
            step, state, at = restored(copy, abstract)
            if step == 12:
                assert at == position
                jax.tree.map(np.testing.assert_array_equal, state, wanted)


def test_run_writes_a_damaged_step_again(copy, finished):
    [file] = (Path(copy.output_dir) / "checkpoints/12/state/ocdbt.process_0/d").iterdir()
    cut(file)
    loop.run(copy)
    assert steps_of(copy) == ["12", "12.unreadable", "8"]
    assert_same_run(copy, finished)


def test_nothing_is_moved_if_nothing_can_be_read(copy, capfd):
    for step in ("8", "12"):
        (Path(copy.output_dir) / "checkpoints" / step / "state" / "manifest.ocdbt").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint of steps \[8, 12\] .* --restart"):
        loop.run(copy)
    assert steps_of(copy) == ["12", "8"]
    assert "Traceback" not in capfd.readouterr().err


def patch_commit(monkeypatch, step, act):
    """Have `act` called in the background when a checkpoint's folder is about to get its name."""
    finalize = atomicity.AtomicRenameTemporaryPath.finalize

    async def patched(self):
        if self.get_final().name == str(step):
            await asyncio.to_thread(act)
        await finalize(self)

    monkeypatch.setattr(atomicity.AtomicRenameTemporaryPath, "finalize", patched)


def test_training_does_not_wait_for_the_disk(finished, folder, monkeypatch):
    config = dataclasses.replace(finished, output_dir=str(folder / "slow"))
    trained, waited = threading.Event(), []
    patch_commit(monkeypatch, 4, lambda: waited.append(trained.wait(60)))
    at_step(monkeypatch, 6, trained.set)
    loop.run(config)
    assert waited == [True]  # the checkpoint of step 4 was not written yet when 6 was done
    assert_same_run(config, finished)


def test_full_disk_keeps_the_last_checkpoint(finished, folder, monkeypatch, capfd):
    config = dataclasses.replace(finished, output_dir=str(folder / "full"))

    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patch_commit(patched, 8, full)
        with pytest.raises(ValueError) as told:
            loop.run(config)
    line = str(told.value)
    assert line.startswith(f"output_dir='{config.output_dir}': disk full; step 4 is saved. A che")
    assert "0.4 MB: free that much, lower keep_checkpoints=2" in line and "\n" not in line
    assert "Traceback" not in capfd.readouterr().err
    assert [x for x in steps_of(config) if x.isdecimal()] == ["4"]
    loop.run(config)
    assert "resuming after step 4" in capfd.readouterr().err
    assert steps_of(config) == ["12", "8"]
    assert_same_run(config, finished)


def test_full_disk_for_real(finished, folder, tmp_path):
    """A file system of 700 kB, which holds one checkpoint and a part of another."""
    mount = f"mount -t tmpfs -o size=700k tmpfs {tmp_path}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("mounting a file system is not permitted here")
    config = folder / "config.py"
    config.write_text(
        f"import tiny_run\nfrom pathlib import Path\n"
        f"config = tiny_run.target_run(Path({str(folder)!r}), output_dir='{tmp_path}/run')\n"
    )
    train = f"{sys.executable} -W ignore -m eagle_jax.train --config {config}"
    script = f"{mount} && {train}; echo status $?; ls {tmp_path}/run/checkpoints"
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, env=ONE_DEVICE
    )
    assert done.stdout.splitlines()[:2] == ["status 2", "4"], done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: output_dir='{tmp_path}/run': disk full; step 4 is saved.")
    assert "Traceback" not in done.stderr


def test_other_errors_are_not_taken_for_a_full_disk(finished, tmp_path):
    for error in (ValueError("RESOURCE_EXHAUSTED: out of memory"), OSError(errno.EIO, "x")):
        with pytest.raises(type(error)) as raised, telling_full_disk(tmp_path, finished, 1):
            raise error
        assert raised.value is error


# --- Divergence ------------------------------------------------------------------------------


def test_divergence_names_its_batch(finished, folder):
    output = folder / "diverged"
    optim = dataclasses.replace(finished.optim, learning_rate=1e12, warmup_steps=0)
    config = dataclasses.replace(finished, output_dir=str(output), optim=optim)
    with pytest.raises(ValueError, match="training diverged on rows") as told:
        loop.run(config)
    step = metrics.read_trace(output / metrics.TRACE)[-1]["step"]
    rows = data.step_rows(config.data, step)
    assert len(rows) == 8
    line = str(told.value)
    assert f"at step {step}: training diverged on rows {', '.join(map(str, rows))} of" in line
    assert str(output / divergence.BATCH) in line and "\n" not in line
    texts = [json.loads(x) for x in (output / divergence.BATCH).read_text().splitlines()]
    assert list(dict.fromkeys(x["row"] for x in texts)) == rows
    iterator = data.train_iterator(config.data)
    batch = [next(iterator) for _ in range(step)][-1]
    assert sum(x["tokens"] for x in texts) == (batch["segment_ids"] > 0).sum()
    assert sum(x["trained"] for x in texts) == batch["loss_mask"].sum()
    assert all(x["text"].startswith("<|user|>") for x in texts)


@pytest.mark.parametrize("shards", [1, 2])
def test_step_rows_are_those_of_the_batch(shards, finished):
    config = finished.data
    source = prepared.open_rows(data.prepare(config.train, config))
    iterators = [
        data.train_iterator(config, shard_index=i, shard_count=shards) for i in range(shards)
    ]
    for step in range(1, 2 * len(source) // config.batch_size):  # two epochs
        rows = data.step_rows(config, step)
        batch = np.concatenate([next(iterator)["tokens"] for iterator in iterators])
        np.testing.assert_array_equal(batch, [source[row]["tokens"] for row in rows])
    with pytest.raises(ValueError, match="step=0: must be at least 1"):
        data.step_rows(config, 0)


def check(watch: divergence.Guard, step: int, loss: float) -> None:
    watch.check(step, {"loss": loss, "gradient_norm": 1.0})


def test_spike_stops_a_run(finished, tmp_path):
    config = dataclasses.replace(finished, stop_on_spike=2.0)
    watch = divergence.Guard(config, tmp_path, [])
    check(watch, 1, 9.0)
    check(watch, 2, 99.0)  # too early to know what is usual
    for step in range(3, 40):
        check(watch, step, 1.0 + step % 2)
    check(watch, 40, 2.9)
    with pytest.raises(ValueError, match=r"loss=4.1 at step 41: above stop_on_spike=2 times the"):
        check(watch, 41, 4.1)
    resumed = divergence.Guard(config, tmp_path, [1.0 + step % 2 for step in range(30)])
    with pytest.raises(ValueError, match="on rows .* of data.train"):
        check(resumed, 31, 4.1)
    off: Any = divergence.Guard(finished, tmp_path, [1.0] * 50)
    check(off, 51, 1e9)


def test_resumed_run_knows_the_losses_before(copy, finished, monkeypatch):
    seen = []
    monkeypatch.setattr(divergence, "Guard", lambda *arguments: seen.append(arguments[-1]))
    loop.run(copy)  # at its end already
    trace = metrics.read_trace(Path(finished.output_dir) / metrics.TRACE)
    assert seen == [[x["loss"] for x in trace if "loss" in x]]


def test_spike_factor_is_checked(finished):
    with pytest.raises(ValueError, match="stop_on_spike=0.5: must be above 1, or 0"):
        loop.run(dataclasses.replace(finished, stop_on_spike=0.5))
