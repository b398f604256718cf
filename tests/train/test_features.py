"""LazyTensor features: written through kills and by shards, refused when foreign, trained on."""

import dataclasses
import json
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from eagle_jax.checkpoint import hf
from eagle_jax.config import Distillation, MedusaTraining, TrainingTimeTest
from eagle_jax.models import Transformer, cast
from eagle_jax.testing import random_params, tiny_eagle3, tiny_medusa, tiny_model, tiny_target
from eagle_jax.train import data, features, loop, metrics, objectives, offline
from eagle_jax.train.objectives import target

TESTS = str(Path(tiny_run.__file__).parent)
ROWS = 16  # of a file
STEPS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("features")


def configure(folder, kind="eagle", stored: Any = "", **changes) -> Any:
    """A draft's run against a random target, which is written if it is not there."""
    base: Any = tiny_run.draft_run(folder, str(folder / "model"), steps=STEPS)
    model = tiny_target(base.objective.draft.vocab_size)
    if not (folder / "model").exists():
        hf.save_target(folder / "model", model, random_params(Transformer, model, 0, 4.0))
    place = str(folder / "model")
    objective = {
        "eagle": base.objective,
        "eagle3": TrainingTimeTest(draft=tiny_eagle3(model), target=place, steps=2),
        "medusa": MedusaTraining(draft=tiny_medusa(model), target=place, labels="soft"),
        "model": Distillation(draft=tiny_model(model), target=place),
    }[kind]
    objective = dataclasses.replace(objective, features=str(stored))
    base = dataclasses.replace(base, objective=objective, eval_every=5, checkpoint_every=4)
    return dataclasses.replace(base, **changes)


@pytest.fixture(scope="module")
def stored(folder):
    """Features for an EAGLE-3 head, which serve all others."""
    features.write(configure(folder, "eagle3"), folder / "stored", rows_per_file=ROWS)
    return folder / "stored"


@pytest.fixture(scope="module")
def int8(folder):
    """Features for an EAGLE-1 head."""
    config = configure(folder)
    made = features.write(config, folder / "int8", dtype="int8", rows_per_file=ROWS)
    assert made["train"]["bytes_per_token"] == 32 + 4
    return folder / "int8"


@pytest.fixture(scope="module")
def online(folder):
    """A run whose target runs in every step."""
    config = configure(folder, output_dir=str(folder / "online"))
    return trace(config, loop.run(config))


@pytest.fixture(scope="module")
def finished(folder, stored):
    """The same on stored features."""
    config = configure(folder, stored=stored, output_dir=str(folder / "offline"))
    return config, trace(config, loop.run(config))


def trace(config, result):
    assert result["steps"] == config.optim.steps
    return metrics.read_trace(Path(config.output_dir) / metrics.TRACE)


def values(lines, name):
    """Of every step, or of every validation."""
    if name.startswith("validation "):
        return [x["validation"][name.split()[1]] for x in lines if "validation" in x]
    return [line[name] for line in lines if name in line]


def tree(directory):
    """Every file of a directory, byte for byte."""
    found = sorted(x for x in directory.rglob("*") if x.is_file())
    return {str(x.relative_to(directory)): x.read_bytes() for x in found}


# --- Writing ---------------------------------------------------------------------------------


def command(folder, *arguments, body=""):
    """The command line in a process of its own, after `body`."""
    config = folder / "config.py"
    config.write_text(
        f"import sys; sys.path[:0] = [{TESTS!r}, {str(Path(TESTS) / 'train')!r}]\n"
        "from pathlib import Path\nimport test_features\n"
        f"config = test_features.configure(Path({str(folder)!r}), 'eagle3')\n"
    )
    arguments = ["features", "--config", str(config), "--rows-per-file", str(ROWS), *arguments]
    code = textwrap.dedent(body) + (
        f"\nimport sys; sys.argv = {arguments!r}\n"
        "from eagle_jax import cli\nfrom eagle_jax.train import features\ncli.run(features.main)\n"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_killed_writer_goes_on_to_the_same_bytes(folder, stored):
    """A file that is half written and taken for a whole one, or bytes that depend on the start."""
    output = folder / "killed"
    body = f"""
        import os, signal
        from eagle_jax.train import offline
        record, calls = offline.record, []
        def dying(*arguments):
            calls.append(arguments)
            if len(calls) == {2 * ROWS + ROWS // 2}:
                os.kill(os.getpid(), signal.SIGKILL)
            return record(*arguments)
        offline.record = dying
    """
    killed = command(folder, "--output", str(output), body=body)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = tree(output)
    assert [name for name in left if name.endswith(".unfinished")]
    assert len([name for name in left if name.endswith(".array_record")]) == 2
    resumed = features.write(configure(folder, "eagle3"), output, rows_per_file=ROWS)
    whole = tree(stored)
    assert tree(output) == whole
    assert resumed["train"]["skipped"] == 2
    assert resumed["train"]["files"] + 2 == resumed["train"]["files_of_all_shards"] >= 4
    again = features.write(configure(folder, "eagle3"), output, rows_per_file=ROWS)
    assert again["train"]["files"] == 0 and tree(output) == whole


def test_shards_together_are_the_whole(folder, stored):
    output, config = folder / "shards", configure(folder, "eagle3")
    parts = [
        features.write(config, output, shard=i, shards=2, rows_per_file=ROWS)["train"]
        for i in (1, 0)
    ]
    assert all(part["files"] for part in parts) and tree(output) == tree(stored)
    made = json.loads((output / "train" / offline.MANIFEST).read_text())
    text, rows = data.rows(config.data)
    assert sum(part["rows"] for part in parts) == made["rows"] == len(rows)
    tokens = sum(int(np.count_nonzero(rows[i]["segment_ids"])) for i in range(len(rows)))
    assert sum(part["tokens"] for part in parts) == tokens < len(rows) * tiny_run.LENGTH
    assert {part["bytes_per_token"] for part in parts} == {4 * 32 * 2.0}
    assert made["text"] == text and made["layers"] == [0, 1, 2]


def test_command_line(folder, stored):
    done = command(folder, "--output", str(stored), "--shard", "0/2")
    assert done.returncode == 0, done.stderr
    [line] = done.stdout.splitlines()
    assert json.loads(line)["train"]["skipped"] == 3
    config = configure(folder, "eagle3")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"shard": 2, "shards": 2}, "shard=2/2: must be 0/2 to 1/2"),
        ({"rows_per_file": 0}, "rows_per_file=0: must be at least 1"),
        ({"dtype": "int4"}, "dtype='int4': must be one of bfloat16, int8"),
        ({"dtype": "int8"}, "has rows_per_file=16, this command would write 64; give another"),
    ]
    for change, told in wrong:
        with pytest.raises(ValueError, match=re.escape(told)):
            features.write(config, stored, **change)
    with pytest.raises(ValueError, match="--shard=1of2: write i/n"):
        features._shard("1of2")
    with pytest.raises(ValueError, match="NextToken reads no features"):
        features.write(tiny_run.target_run(folder), stored)
    far = dataclasses.replace(config.objective.draft, aux_layers=(0, 1, 9))
    far = dataclasses.replace(config.objective, draft=far)
    with pytest.raises(ValueError, match="aux_layers=.*: the target has 2 layers"):
        features.write(dataclasses.replace(config, objective=far), folder / "never")
    assert not (folder / "never").exists()


def test_int8_is_off_by_half_a_step_at_most():
    """Scales that streams or tokens share, or zeros that become something else."""
    sizes = 10.0 ** np.arange(-3, 3)[None, :, None]
    streams = [
        jnp.asarray(np.random.default_rng(i).normal(size=(2, 6, 32)) * sizes, jnp.float32)
        for i in range(2)
    ]
    streams[1] = streams[1].at[0, 2].set(0.0)
    batch = target.compress(streams, "int8")
    found = target._expand(batch, jnp.dtype(jnp.float32))
    for stream, got in zip(streams, found, strict=True):
        step = np.abs(stream).max(-1, keepdims=True) / 127
        assert (np.abs(got - stream) <= 0.501 * step).all()
    assert not found[1][0, 2].any()


# --- Training --------------------------------------------------------------------------------


def test_offline_training_equals_online(online, finished):
    """bfloat16 storage of float32 features: other rows or noise would be off by far more."""
    _, lines = finished
    assert [line["step"] for line in lines] == [line["step"] for line in online]
    limits = {"loss": 5e-4, "gradient_norm": 1e-2, "validation loss": 5e-4, "count": 0.0}
    for name, tolerance in limits.items():
        np.testing.assert_allclose(values(lines, name), values(online, name), rtol=tolerance)


def read(folder, kind, place):
    """The objective without and with stored features, and its first batch both ways."""
    config = configure(folder, kind, compute_dtype="bfloat16")
    away = configure(folder, kind, place, compute_dtype="bfloat16")
    batch = next(data.train_iterator(config.data))
    more = next(data.train_iterator(config.data, features=offline.find(away)["train"]))
    assert all((batch[name] == more[name]).all() for name in batch)
    return [(objectives.build(config), batch), (objectives.build(away), more)]


def arguments(task, batch):
    """Of `task.loss`, with everything in bfloat16."""
    frozen = {name: jnp.asarray(x, jnp.bfloat16) for name, x in task.frozen().items()}
    return cast(task.init(1, task.frozen()), jnp.bfloat16), frozen, batch, None


@pytest.mark.parametrize(("kind", "dtype"), [("eagle3", "bfloat16"), ("eagle", "int8")])
def test_losses_are_the_same(kind, dtype, folder, stored, int8):
    """Streams in another order, or scales of other tokens."""
    found = []
    for task, batch in read(folder, kind, stored if dtype == "bfloat16" else int8):
        _, sums = jax.jit(task.loss)(*arguments(task, batch))
        found.append([float(sums[name]) for name in ("loss", "top3", "count")])
    (one, hits, count), (two, other_hits, other_count) = found
    # XLA keeps some bfloat16 results wider inside a program.
    np.testing.assert_allclose(one, two, rtol=1e-3 if dtype == "bfloat16" else 3e-3)
    assert abs(hits - other_hits) <= 0.02 * count and count == other_count


@pytest.mark.parametrize("kind", ["eagle", "eagle3", "medusa", "model"])
def test_of_the_target_only_its_ends_are_read(kind, folder, stored):
    (online, batch), (offline, more) = read(folder, kind, stored)
    assert set(offline.frozen()) == set(target.ENDS) < set(online.frozen())
    assert 0 < offline.flops_per_token(32) < online.flops_per_token(32)
    shapes = [
        jax.eval_shape(task.loss, *jax.eval_shape(lambda x=task, y=rows: arguments(x, y)))
        for task, rows in ((online, batch), (offline, more))
    ]
    assert shapes[0] == shapes[1]


def test_resumed_run_equals_uninterrupted(folder, stored, finished):
    """Positions of text and features that part when a run goes on; features that moved."""
    config, lines = finished
    output = str(folder / "resumed")
    short = dataclasses.replace(config.optim, steps=4)
    first = dataclasses.replace(config, output_dir=output, optim=short, eval_every=0)
    loop.run(first)
    moved = folder / "moved"
    moved.symlink_to(stored)
    second = configure(folder, stored=moved, output_dir=output)
    assert trace(second, loop.run(second)) == lines
    one, two = (Path(x.output_dir) / "export/model.safetensors" for x in (config, second))
    assert one.read_bytes() == two.read_bytes()


def test_a_run_cannot_go_on_with_other_features(folder, int8, finished):
    config, _ = finished
    for place in (int8, ""):
        other = configure(folder, stored=place, output_dir=config.output_dir)
        with pytest.raises(ValueError, match="objective.features=.* has 'manifest [0-9a-f]{16}'"):
            loop.run(other)


def test_workers_read_them_too(folder, stored):
    config = configure(folder, stored=stored)
    source = offline.find(config)["train"]
    plain = data.train_iterator(config.data, features=source)
    busy = data.train_iterator(dataclasses.replace(config.data, workers=1), features=source)
    try:
        for _ in range(2):
            one, two = next(plain), next(busy)
            assert one["features"].dtype == two["features"].dtype == jnp.bfloat16
            assert all((one[name] == two[name]).all() for name in one) and one.keys() == two.keys()
    finally:
        busy.close()


# --- Refusals --------------------------------------------------------------------------------


def refused(config):
    """The one line that training refuses with, before anything is compiled."""
    with pytest.raises(ValueError) as told:
        loop.run(dataclasses.replace(config, output_dir="/nowhere"))
    assert "\n" not in str(told.value)
    return str(told.value)


def test_foreign_features_are_refused(folder, stored, tmp_path):
    config = configure(folder, "eagle3", stored)
    draft, text = config.objective.draft, config.data

    def changed(draft=draft, place=config.objective.target, **of_data):
        objective = dataclasses.replace(config.objective, draft=draft, target=str(place))
        return dataclasses.replace(
            config, objective=objective, data=dataclasses.replace(text, **of_data)
        )

    other = tiny_target(draft.vocab_size)
    hf.save_target(tmp_path / "trained", other, random_params(Transformer, other, 1, 4.0))
    turned = dataclasses.replace(other, rope_theta=5000.0)
    hf.save_target(tmp_path / "turned", turned, random_params(Transformer, other, 0, 4.0))
    more = tiny_run.write_conversations(tmp_path / "more.jsonl", 30)
    for run, said in (
        (changed(place=tmp_path / "trained"), "the weights' hash of objective.target was "),
        (changed(place=tmp_path / "turned"), "target.rope_theta was 10000.0 when the train"),
        (changed(train=(more,)), "data.train's text was "),
        (changed(validation=(more,)), "data.validation's text was "),
        (changed(sequence_length=40), "data.sequence_length was 48 when the train features"),
    ):
        line = refused(run)
        assert line.startswith(f"objective.features='{stored}': ") and said in line, line
        assert " now; set it back, or write features of it into another directory" in line
    narrow = folder / "narrow"
    features.write(configure(folder), narrow, rows_per_file=ROWS)
    line = refused(configure(folder, "eagle3", narrow))
    assert "objective.draft.aux_layers was [] when the train features were written and" in line
    assert "is [0, 1, 2] now" in line


def test_missing_and_damaged_files_are_named(folder, tmp_path):
    config = configure(folder)
    features.write(config, tmp_path / "own", rows_per_file=ROWS)
    config = configure(folder, stored=tmp_path / "own")
    first, second, *_ = sorted((tmp_path / "own" / "train").glob("*.array_record"))
    whole = second.read_bytes()
    second.write_bytes(whole[: len(whole) // 2])
    assert re.match(rf"{second}: cannot be read \(.*\); delete it and run `python", refused(config))
    second.unlink()
    line = refused(config)
    assert re.search(r"lacks 1 of \d files of train/ \(rows-000000016.array_record\); run", line)
    second.write_bytes(whole)
    content = bytearray(first.read_bytes())
    record = offline.find(config)["train"].source[3]
    content[content.index(record) + 7] ^= 1
    first.write_bytes(content)
    with pytest.raises(ValueError, match=f"{first}: the features of row . cannot be read .*delete"):
        batch = data.rows(config.data, features=offline.find(config)["train"])[1]
        [batch[i] for i in range(ROWS)]
    for name in ("validation", "train"):
        (tmp_path / "own" / name / offline.MANIFEST).unlink()
        assert f"has no {name}/manifest.json; write them with `python -m" in refused(config)
