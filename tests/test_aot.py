"""Compilation for TPUs that are not there."""

import dataclasses
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
import tiny_pair

from eagle_jax import aot, settings, sharding
from eagle_jax.aot import programs, topology
from eagle_jax.drafters.eagle.module import EagleDraft
from eagle_jax.layout import PLAIN
from eagle_jax.models import kernels
from eagle_jax.testing import tiny_draft, tiny_target

ROOT = tiny_pair.ROOT

HLO = """
  %a = bf16[2,4]{1,0:T(8,128)} all-reduce(%x), replica_groups={}
  %b = (f32[8]{0}, s32[8]{0}) all-gather-start(%y), dimensions={0}
  %c = f32[8]{0} all-gather-done(%b)
  %d = pred[3]{0} collective-permute(%z)
  %e = f32[4]{0} add(%p, %q), metadata={op_name="all-reduce(fake"}
"""


def test_collectives_are_counted():
    """Catches a start and its end that count twice, and results that are tuples."""
    found = aot.collectives(HLO)
    assert {kind: number for kind, (number, _) in found.items()} == {
        "all-gather": 1,
        "all-reduce": 1,
        "collective-permute": 1,
    }
    sizes = {kind: round(size * 2**20) for kind, (_, size) in found.items()}
    assert sizes == {"all-gather": 64, "all-reduce": 16, "collective-permute": 3}


GPU_HLO = """
%body (a: f32[2]) -> f32[2] {
  %fusion.9 = f32[2]{0} fusion(%a), kind=kLoop, calls=%inner
}

ENTRY %main (a: f32[2], b: f32[2]) -> (f32[2], f32[2]) {
  %a = f32[2]{0} parameter(0)
  %fusion = f32[2]{0} fusion(%a), kind=kLoop, calls=%inner
  %call.1 = (f32[2]{0}, s32[2]{0}) custom-call(%fusion), custom_call_target="x"
  %get.1 = f32[2]{0} get-tuple-element(%call.1), index=0
  %sum-start = f32[2]{0} all-reduce-start(%get.1)
  %sum-done = f32[2]{0} all-reduce-done(%sum-start)
  %copy.1 = f32[2]{0} copy(%sum-done)
  ROOT %tuple = (f32[2]{0}, f32[2]{0}) tuple(%copy.1, %b)
}
"""


def test_launches_are_counted():
    """Catches what costs nothing, the end of what began, and another computation's lines."""
    assert aot.launches(GPU_HLO) == 4
    assert aot.launches(GPU_HLO.replace("copy(", "while(")) is None


@pytest.mark.parametrize("name", ["tiny", "llama_8b", "llama_70b", "gpu_7b", "gpu_70b"])
def test_every_config_is_read(name):
    config = settings.load(ROOT / f"configs/aot/{name}.py", kind=aot.AotConfig)
    assert config.method is not None and (config.train is None) == name.startswith("gpu")


def test_settings_that_cannot_be():
    with pytest.raises(ValueError, match="batch_size=0: must be at least 1"):
        settings.load(ROOT / "configs/aot/tiny.py", ["batch_size=0"], kind=aot.AotConfig)
    with pytest.raises(ValueError, match="method=None: give a method, or a training run"):
        aot.AotConfig("v5e:2x4", tiny_target())


def test_arguments_of_a_draft_vocabulary():
    """Catches a table in bfloat16, or cut where every device reads all of it."""
    mesh = sharding.make_mesh(tensor=4, devices=jax.devices()[:4])
    draft = tiny_draft(tiny_target(64), draft_vocab_size=40, num_key_value_heads=4)
    draft = dataclasses.replace(draft, num_attention_heads=4)
    found = programs.abstract_weights(mesh, EagleDraft, draft, PLAIN)
    table, head = found["d2t"], found["lm_head.kernel"]
    assert (table.shape, table.dtype) == ((40,), jnp.int32) and table.sharding.is_fully_replicated
    assert (head.shape, head.dtype) == ((32, 40), jnp.bfloat16)
    assert head.sharding.shard_shape(head.shape) == (32, 10)


def test_without_libtpu_it_says_so(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"libtpu is not installed; pip install 'eagle-jax\[tpu\]'"
    ):
        aot.devices("v5e:2x4")


def test_without_the_cuda_plugin_it_says_so(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"'h100:2': JAX's CUDA plugin is not installed; pip inst"):
        aot.devices("h100:2")
    with pytest.raises(ValueError, match="topology='h200': give 1 to 8 GPUs, as in h200:2"):
        aot.devices("h200")


def test_programs_for_a_device_that_is_not_there():
    """Catches kernels that are left out, or chosen by the device that compiles."""
    made = functools.partial(mock.Mock, spec=jax.Device)
    gpu, tpu = made(platform="gpu", compute_capability="9.0"), made(platform="tpu")
    older = made(platform="gpu", compute_capability="7.5")
    dtype = jnp.dtype(jnp.bfloat16)
    for device, wanted in ((gpu, True), (older, False), (tpu, False)):
        with kernels.tracing_for(device):
            assert kernels.on_gpu() == (device is not tpu)
            assert kernels.expected(dtype) == wanted
    assert not kernels.on_gpu() and not kernels.expected(dtype)


needs_cuda = pytest.mark.skipif(
    not topology.installed("jax_plugins.xla_cuda13"),
    reason="JAX's CUDA plugin is not installed here (pip install 'eagle-jax[cuda]')",
)


@needs_cuda
@pytest.mark.parametrize("number", [1, 2])
def test_decoding_compiles_for_gpus(number):
    """Catches weights and caches that travel (an embedding, of which one row is looked up) or are
    copied, and kernels that Triton refuses."""
    options = [f"topology=h100:{number}", f"tensor={number}", "target.num_hidden_layers=2"]
    changes = [word for option in options for word in ("--set", option)]
    out = json.loads(run("--config", "configs/aot/gpu_7b.py", *changes).splitlines()[-1])
    rows = {row["program"]: row for row in out["rows"]}
    assert set(rows) == {f"{name}: {what}" for name in ("vanilla", "Eagle") for what in PROGRAMS}
    for name, row in rows.items():
        assert row["host"] == [] and row["gflop"] is None
        assert (row["launches"] is None) == name.endswith("loop")
        assert row["temporaries"] < 0.2
        for kind, (_, size) in row["collectives"].items():
            assert number == 2 and size < 32, (name, kind)  # MiB: no matrix is so small
    vanilla, eagle = (rows[f"{name}: one round"]["launches"] for name in ("vanilla", "Eagle"))
    # Kernels of our own run on all: over two, two sums and what makes them one array more a layer.
    assert vanilla < eagle < (200 if number == 1 else 300) and vanilla < (40 if number == 1 else 55)
    if number == 2:  # of two layers: their sums, and the embedding's; once, the best scores
        loop = rows["vanilla: loop"]["collectives"]
        assert loop["all-reduce"][0] == 2 * 2 + 1 and loop["all-gather"][0] == 1
        assert set(loop) == {"all-reduce", "all-gather"}


# `make test` installs libtpu beside .venv, in .venv-tpu: it prints errors wherever it is installed
# without a TPU. Without that environment, this interpreter's own libtpu is used.
BESIDE = Path(f"{sys.prefix}-tpu/bin/python")
TPU_PYTHON = str(BESIDE) if BESIDE.exists() else sys.executable

needs_libtpu = pytest.mark.skipif(
    not BESIDE.exists() and importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed here (run `make test` on x86 Linux)",
)


@needs_libtpu
def test_a_slice_that_there_is_none_of():
    done = start("--config", "configs/aot/tiny.py", "--set", "topology=v9:2x2", python=TPU_PYTHON)
    assert done.returncode == 2
    assert re.search(r"error: topology='v9:2x2': .*; e.g. v5e:2x4", done.stderr)


@needs_libtpu
def test_everything_compiles_for_a_tpu():
    """Catches an operation that TPUs lack, a callback to the host, and weights that travel."""
    out = json.loads(run("--config", "configs/aot/tiny.py", python=TPU_PYTHON).splitlines()[-1])
    rows = {row["program"]: row for row in out["rows"]}
    assert set(rows) == {
        *(f"{name}: {what}" for name in ("vanilla", "Eagle") for what in PROGRAMS),
        "FeatureRegression: training step",
    }
    for row in rows.values():
        assert row["host"] == [] and 0 < row["arguments"] < row["total"] < 0.1
        assert 0 < row["share"] < 0.01
    assert rows["vanilla: one round"]["floor"] > 0
    # Of two layers: their sums, the embedding's, and the drawn token.
    assert rows["vanilla: one round"]["collectives"]["all-reduce"][0] <= 2 * 2 + 1 + 2
    assert rows["FeatureRegression: training step"]["gflop_counted"] > 0


PROGRAMS = ("prefill", "one round", "loop")


def start(*arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    """Runs the command in a process of its own, which must not find the tests' eight devices."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_"))}
    command = [python, "-m", "eagle_jax.aot", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def run(*arguments: str, python: str = sys.executable) -> str:
    """Returns what the command prints, after it has ended well."""
    done = start(*arguments, python=python)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"vanilla: one round +\d\.\d\d", done.stderr)
    return done.stdout
