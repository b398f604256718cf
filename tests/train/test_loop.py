"""The loop: sharding, resumption, reporting, errors."""

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
from eagle_jax.checkpoint.train_state import check_same, flatten
from eagle_jax.config import OptimConfig
from eagle_jax.train import divergence, loop, metrics, objectives
from eagle_jax.train.trainer import build, optimizer, schedule

TESTS = str(Path(tiny_run.__file__).parent)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def target(folder):
    """A finished target run and its result."""
    config = tiny_run.target_run(folder)
    return config, loop.run(config)


@pytest.fixture(scope="module")
def draft(folder, target):
    """A finished draft run on that target, and its result."""
    config = tiny_run.draft_run(folder, target[1]["export"])
    return config, loop.run(config)


def trace(config):
    return metrics.read_trace(Path(config.output_dir) / metrics.TRACE)


def program(body: str) -> subprocess.CompletedProcess:
    """Runs Python code in a process of its own, with the tests' helpers importable."""
    code = f"import sys; sys.path.insert(0, {TESTS!r})\n" + textwrap.dedent(body)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


# --- Whole runs ------------------------------------------------------------------------------


def test_both_objectives_learn_and_report(target, draft):
    for config, result in (target, draft):
        steps = [line for line in trace(config) if "loss" in line]
        held_out = [line for line in trace(config) if "validation" in line]
        assert [line["step"] for line in steps] == list(range(1, 13))
        assert [line["step"] for line in held_out] == [5, 10, 12]
        assert steps[-1]["loss"] < 0.7 * steps[0]["loss"]
        assert result["loss"] == steps[-1]["loss"]
        assert result["validation_loss"] == held_out[-1]["validation"]["loss"]
        assert result["steps"] == 12 and result["tokens"] == 12 * 8 * tiny_run.LENGTH
        assert result["tokens_per_second"] > 0 and result["mfu"] is None  # a CPU
        output = Path(config.output_dir)
        assert (output / "loss.png").stat().st_size > 1000
        assert list((output / "events").iterdir())
        assert sorted(x.name for x in (output / "checkpoints").iterdir()) == ["12", "8"]
        json.dumps(result)


def test_exports_load(target, draft):
    config, params = hf.load_target(target[1]["export"])
    assert config == target[0].objective.model
    assert (Path(target[1]["export"]) / "tokenizer.json").is_file()
    draft_config, draft_params = hf.load_draft(draft[1]["export"])
    assert draft_config == draft[0].objective.draft
    hf.check_fit(config, draft_config)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in draft_params.values())
    # The export is the last state, not the first.
    first = loop.objectives.NextTokenObjective(config).init(0, {})
    assert not np.allclose(
        np.asarray(params["lm_head.kernel"], np.float32), first["lm_head.kernel"]
    )


def test_finished_run_only_exports_again(target, capsys):
    config, before = target
    lines = trace(config)
    again = loop.run(config)
    assert "finished at step 12; exporting again" in capsys.readouterr().err
    assert trace(config) == lines
    assert again["loss"] == before["loss"] and again["tokens_per_second"] is None


def test_killed_run_continues_with_the_same_losses(target, draft, folder):
    """A draft's; test_twenty_kills has a target's."""
    config, result = draft
    again = folder / "killed"
    body = f"""
        import os, signal
        from pathlib import Path
        import tiny_run
        from eagle_jax.train import loop, metrics

        record = metrics.Report.step
        def step(self, number, values):
            record(self, number, values)
            self.sync()
            if number == 11 and DIES:
                os.kill(os.getpid(), signal.SIGKILL)
        metrics.Report.step = step
        folder = Path({str(folder)!r})
        loop.run(tiny_run.draft_run(folder, {target[1]["export"]!r}, output_dir={str(again)!r}))
    """
    killed = program(body.replace("DIES", "True"))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    changed = dataclasses.replace(config, output_dir=str(again))
    assert trace(changed)[-1]["step"] == 11
    resumed = program(body.replace("DIES", "False"))
    assert resumed.returncode == 0, resumed.stderr
    # The checkpoint of step 8 may have been half written; that of step 4 was complete by then.
    assert re.search("resuming after step [48]\n", resumed.stderr)
    one, two = (Path(x) / metrics.TRACE for x in (config.output_dir, again))
    assert one.read_bytes() == two.read_bytes()
    one, two = (Path(x) / "model.safetensors" for x in (result["export"], again / "export"))
    assert one.read_bytes() == two.read_bytes()


def test_another_computation_is_refused(target):
    config, _ = target
    changed = dataclasses.replace(
        config, optim=dataclasses.replace(config.optim, learning_rate=2e-2)
    )
    with pytest.raises(ValueError, match=r"optim.learning_rate=0.02: the run in .* has 0.01;.*--r"):
        loop.run(changed)


def test_restart_begins_anew_and_spares_other_files(target, folder):
    config = dataclasses.replace(
        target[0],
        output_dir=str(folder / "restarted"),
        optim=dataclasses.replace(target[0].optim, steps=2),
        eval_every=0,
    )
    loop.run(config)
    (folder / "restarted" / "notes.txt").write_text("mine")
    changed = dataclasses.replace(config, seed=1)
    with pytest.raises(ValueError, match="seed=1"):
        loop.run(changed)
    before = trace(config)
    result = loop.run(changed, restart=True)
    assert len(trace(config)) == 2 and trace(config) != before
    assert result["validation_loss"] is None
    assert (folder / "restarted" / "notes.txt").read_text() == "mine"


def test_command_line(target, folder):
    config = folder / "config.py"
    config.write_text(
        f"import sys; sys.path.insert(0, {TESTS!r})\n"
        f"import tiny_run\nfrom pathlib import Path\n"
        f"config = tiny_run.target_run(Path({str(folder)!r}))\n"
    )

    def command(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "eagle_jax.train", "--config", str(config), *arguments],
            capture_output=True,
            text=True,
        )

    missing = command("--set", "data.train=('absent.jsonl',)")
    assert missing.returncode == 2 and missing.stdout == ""
    [line] = missing.stderr.strip().splitlines()
    assert line.startswith("error: ") and "absent.jsonl" in line
    untouched = folder / "untouched"
    dry = command("--dry-run", "--set", f"output_dir={untouched}")
    assert dry.returncode == 0, dry.stderr
    [line] = dry.stdout.splitlines()
    result = json.loads(line)
    assert result["trained_parameters"] == sum(
        x.size for x in hf.load_target(target[1]["export"])[1].values()
    )
    assert not untouched.exists()


# --- Sharding --------------------------------------------------------------------------------


def losses(config, devices, steps=3):
    """Losses of the first steps on some devices, from the objective's own start."""
    trainer = build(config, objectives.build(config), devices)
    iterator = loop.data.train_iterator(config.data)
    state, found = trainer.init(), []
    for _ in range(steps):
        state, values = trainer.step(state, trainer.frozen, trainer.put(next(iterator)))
        found.append([float(values["loss"]), float(values["gradient_norm"])])
    return np.array(found), state


@pytest.mark.parametrize("kind", ["target", "draft"])
def test_devices_and_fsdp_change_nothing(kind, target, draft):
    config, _ = target if kind == "target" else draft
    one, _ = losses(config, jax.devices()[:1])
    eight, state = losses(dataclasses.replace(config, fsdp=4), jax.devices())
    np.testing.assert_allclose(one, eight, rtol=1e-5)
    kernel = state.params["layers.0.mlp.gate_proj.kernel"]
    shapes = {shard.data.shape for shard in kernel.addressable_shards}
    assert shapes == {(kernel.shape[0], kernel.shape[1] // 4)}
    moments = [x for x in jax.tree.leaves(state.optimizer) if x.shape == kernel.shape]
    assert moments and all(not x.sharding.is_fully_replicated for x in moments)


def test_cudnn_needs_a_gpu(target):
    config = dataclasses.replace(target[0], attention="cudnn", output_dir="/nowhere")
    with pytest.raises(ValueError, match="attention='cudnn': needs a GPU"):
        loop.run(config)


# --- Parts -----------------------------------------------------------------------------------


def rate(config, count):
    return float(np.asarray(schedule(config)(count)))


def test_schedule():
    config = OptimConfig(2.0, steps=10, warmup_steps=4, schedule="cosine", final_fraction=0.1)
    rates = [rate(config, n) for n in range(10)]
    np.testing.assert_allclose(rates[:4], [0.5, 1.0, 1.5, 2.0])
    np.testing.assert_allclose(rates[6], 1.1)  # half way from 2.0 to 0.2
    np.testing.assert_allclose(rates[9], 0.2)
    np.testing.assert_allclose(rate(dataclasses.replace(config, schedule="linear"), 6), 1.1)
    constant = dataclasses.replace(config, schedule="constant", warmup_steps=0)
    assert rate(constant, 0) == rate(constant, 9) == 2.0


def update(config, gradient, params):
    """One step of the optimizer: updates, and the largest first moment of a matrix."""
    with jax.numpy_dtype_promotion("standard"):
        transform = optimizer(config)
        updates, state = transform.update(gradient, transform.init(params), params)
    first = [np.asarray(x).max() for x in jax.tree.leaves(state) if np.ndim(x) == 2]
    return jax.tree.map(np.asarray, updates), max(first)


def test_decay_acts_on_matrices_only_and_clipping_clips():
    params: Any = {"matrix": jnp.ones((2, 2)), "scale": jnp.ones(2)}
    plain = OptimConfig(0.1, steps=1, weight_decay=0.5)
    updates, _ = update(plain, jax.tree.map(jnp.zeros_like, params), params)
    np.testing.assert_allclose(updates["matrix"], np.full((2, 2), -0.05), rtol=1e-6)
    assert not updates["scale"].any()
    # Six equal elements; the first moment after one step is (1 - b1) times the clipped one.
    huge = jax.tree.map(lambda x: 100.0 * x, params)
    _, moment = update(dataclasses.replace(plain, clip_value=0.5), huge, params)
    np.testing.assert_allclose(moment, 0.05, rtol=1e-5)
    _, moment = update(dataclasses.replace(plain, clip_norm=0.5), huge, params)
    np.testing.assert_allclose(moment, 0.05 / 6**0.5, rtol=1e-5)


class Counter:
    """An iterator with state, as grain's."""

    def __init__(self, end=100):
        self.at, self.end = 0, end

    def __next__(self):
        if self.at == self.end:
            raise StopIteration
        self.at += 1
        return self.at

    def get_state(self):
        return {"at": self.at}


def test_read_ahead_gives_each_batch_its_own_state():
    counter = Counter()
    with loop.read_ahead(counter, lambda x: -x, batches=50) as batches:
        assert next(batches) == (-1, {"at": 1})
        assert next(batches) == (-2, {"at": 2})
    assert counter.at <= 2 + 5  # it did not run away
    with loop.read_ahead(Counter(), lambda x: x, batches=3) as batches:
        assert [batch for batch, _ in batches] == [1, 2, 3]


def test_read_ahead_passes_errors_on():
    with loop.read_ahead(Counter(end=1), lambda x: x, batches=3) as batches:
        next(batches)
        with pytest.raises(ValueError, match="data.train: ended"):
            next(batches)
    with loop.read_ahead(Counter(), lambda x: 1 // 0, batches=3) as batches:
        with pytest.raises(ZeroDivisionError):
            next(batches)


@pytest.mark.parametrize("name", ["loss", "gradient_norm"])
def test_divergence_names_the_step(name, target, tmp_path):
    report = metrics.Report(tmp_path, 0, 5, 1, None)
    late = loop._Late(report, divergence.Guard(target[0], tmp_path, []))
    values = {"loss": jnp.asarray(1.0), "gradient_norm": jnp.asarray(1.0)}
    late.push(1, values)
    late.push(2, values | {name: jnp.asarray(jnp.nan)})
    with pytest.raises(ValueError, match=f"{name}=nan at step 2: training diverged on rows"):
        late.drain()
    report.close()


def test_foreign_tokens_are_refused(target):
    config = target[0]
    trainer = build(config, objectives.build(config))
    with pytest.raises(ValueError, match="gave token 9999, but the model has vocab_size"):
        trainer.put({"tokens": np.full((8, 4), 9999, np.int32)})


def test_trace_is_cut_at_the_checkpoint_and_at_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": n, "loss": 1 / n} for n in range(1, 6)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 6, "lo')
    cut = metrics.Trace(path, 3)
    cut.write({"step": 4, "loss": 0.5})
    cut.close()
    assert metrics.read_trace(path) == [*lines[:3], {"step": 4, "loss": 0.5}]


def test_only_fields_that_change_numbers_bind_a_run(target):
    config = target[0]
    old = json.loads(json.dumps(flatten(config)))
    here = Path("here")
    free = {"fsdp": 4, "output_dir": "x", "keep_checkpoints": 9, "eval_every": 0, "remat": True}
    check_same(old, dataclasses.replace(config, **free), here)
    longer = dataclasses.replace(config, optim=dataclasses.replace(config.optim, steps=99))
    check_same(old, longer, here)  # constant schedule: the steps done stay what they are
    cosine = dataclasses.replace(
        config, optim=dataclasses.replace(config.optim, schedule="cosine", steps=99)
    )
    with pytest.raises(ValueError, match="optim.steps=99"):
        check_same(old, cosine, here)
    deeper = dataclasses.replace(config.objective.model, num_hidden_layers=3)
    other = dataclasses.replace(
        config, objective=dataclasses.replace(config.objective, model=deeper)
    )
    with pytest.raises(ValueError, match="objective.model.num_hidden_layers=3: .* has 2"):
        check_same(old, other, here)


def test_a_field_that_is_newer_than_the_run_has_its_default(target):
    """Catches runs that cannot go on because the configuration got a field since."""
    config = target[0]
    old = json.loads(json.dumps(flatten(config)))
    for name in ("objective.model.rope_scaling", "objective.model.qk_norm", "seed"):
        del old[name]
    check_same(old, config, Path("here"))
    newer = dataclasses.replace(config.objective.model, qk_norm=True)
    newer = dataclasses.replace(
        config, objective=dataclasses.replace(config.objective, model=newer)
    )
    with pytest.raises(ValueError, match="objective.model.qk_norm=True: .* has False"):
        check_same(old, newer, Path("here"))
    del old["objective.model.vocab_size"]
    with pytest.raises(ValueError, match="objective.model.vocab_size=.* has None"):
        check_same(old, config, Path("here"))


def test_a_run_of_before_layouts_goes_on(target):
    """Catches a run that is refused for fields that said how weights lay in memory."""
    config = target[0]
    old = json.loads(json.dumps(flatten(config)))
    old |= {"objective.model.fused": False, "objective.model.fused_qkv": False}
    check_same({**old, "objective.model.quantize": None}, config, Path("here"))
    with pytest.raises(ValueError, match="objective.model.width=None: .* has 3"):
        check_same({**old, "objective.model.width": 3}, config, Path("here"))


def test_unknown_target_is_refused(folder):
    config = tiny_run.draft_run(folder, "no-such-target")
    with pytest.raises(ValueError, match="objective.target='no-such-target': no config.json"):
        objectives.build(config)


def test_soft_capped_logits_are_refused(target):
    """Catches labels of a Gemma 2 that are not its distribution."""
    config = target[0]
    model = dataclasses.replace(config.objective.model, final_logit_softcapping=30.0)
    config = dataclasses.replace(
        config, objective=dataclasses.replace(config.objective, model=model)
    )
    with pytest.raises(ValueError, match="objective.model: has final_logit_softcapping=30.0"):
        objectives.build(config)


def test_import_is_light():
    done = program(
        """
        import eagle_jax.train
        heavy = {"orbax", "grain", "tensorflow_datasets", "matplotlib", "jax", "tensorboardX"}
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
        """
    )
    assert done.returncode == 0, done.stderr
