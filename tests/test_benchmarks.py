"""Every program of benchmarks/ runs at a tiny size and ends in a line of JSON that makes sense."""

import argparse
import dataclasses
import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import decoding
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_pair

from eagle_jax import aot, settings, sharding
from eagle_jax.config import TrainConfig
from eagle_jax.decode import Vanilla, executables
from eagle_jax.decode.method import Accepted, Context
from eagle_jax.decode.tree import Proposal
from eagle_jax.evaluate import EvalConfig
from eagle_jax.models import Transformer, kernels, param_shapes
from eagle_jax.models.kernels import device

ROOT = tiny_pair.ROOT
FOLDER = ROOT / "benchmarks"
HELPERS = ("common", "shapes", "loops", "simulated", "torch_worker")
SMALL = ("--shape", "tiny", "--repeats", "2")
SLOTS = ("--cache", "128", "--used", "40", "--rounds", "4")


def run(name: str, *options: str) -> dict[str, Any]:
    """The JSON line of a benchmark; whatever it measures, it names device and versions."""
    out = tiny_pair.run_program(f"benchmarks/{name}.py", *options)
    result = json.loads(out.splitlines()[-1])
    assert result["benchmark"] == name and len(out.splitlines()) >= len(result["rows"]) + 2
    assert {"device", "jax", "jaxlib", "flax", "driver"} <= set(result)
    return result


@pytest.fixture
def module(monkeypatch) -> Any:
    """Imports a benchmark as a module."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name: str) -> ModuleType:
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return load


def test_step() -> None:
    """A row for each combination that fits; what is read is weights and used cache."""
    options = ["--tokens", "1", "4", "--cache", "32", "128", "--used", "20", "80", "--rounds", "12"]
    result = run("step", *SMALL, *options)
    combinations = [(row["tokens"], row["cache"], row["used"]) for row in result["rows"]]
    assert combinations == [(tokens, 128, used) for tokens in (1, 4) for used in (20, 80)]
    assert result["copy_GBps"] > 0
    for row in result["rows"]:
        read = result["weight_bytes"] + row["used"] * result["kv_bytes_per_token"]
        assert row["GB/s"] == pytest.approx(read / row["ms"] / 1e6)
        # (On CPUs a cache holds so small a model, and a pass may be faster than memory.)
        assert row["ms"] > 0
        assert row["floor ms"] == pytest.approx(read / result["copy_GBps"] / 1e6)
        assert row["of copy"] == pytest.approx(row["floor ms"] / row["ms"])


def test_fewer_layers() -> None:
    """A quick look reads fewer weights; more layers than there are is one line."""
    options = ["--tokens", "1", "--cache", "128", "--used", "20", "--rounds", "4"]
    whole, half = (run("step", *SMALL, *options, *more) for more in ((), ("--layers", "1")))
    assert half["layers"] == 1 and half["weight_bytes"] < whole["weight_bytes"]
    command = [sys.executable, "benchmarks/step.py", "--shape", "tiny", "--layers", "99"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: --layers 99: ")


@pytest.mark.parametrize("more", [(), ("--quantize", "int8")], ids=["bfloat16", "int8"])
def test_cuts(more: tuple[str, ...]) -> None:
    """Every matrix by every cut that fits; the chosen one is among them."""
    options = ("--rows", "1", "--matrices", "o", "gate_up", "--repeats", "1")
    result = run("tile_sweep", "--shape", "tiny", *options, *more)
    assert [row["matrix"] for row in result["rows"]] == ["o", "gate_up"]
    for row in result["rows"]:
        assert row["now"] >= row["best"] > 0 and row["xla"] > 0 and row["floor"] > 0


def test_agree(module, monkeypatch, capsys) -> None:
    """The kernels are as near to float32 as XLA is; one that is wrong is told, and so is where none
    runs."""
    agree, norm, attend = module("check_kernels"), kernels.norm.add, kernels.attention.attend
    monkeypatch.setattr(agree.common, "default_dtype", agree.common.default_dtype)  # undone after
    monkeypatch.setattr(device, "INTERPRET", False)
    monkeypatch.setattr(agree, "_PASSES", agree._PASSES[1::2])
    monkeypatch.setattr(sys, "argv", ["check_kernels.py", "--shape", "tiny", *SLOTS[:4]])

    def rows(status: int) -> list[dict[str, Any]]:
        assert agree.main() == status
        return json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]

    right = rows(0)
    assert [(row["rows"], row["tokens"], row["used"]) for row in right] == [(1, 8, 5), (2, 26, 20)]
    assert all(row["right"] and 0 < row["kernels"] != row["xla"] for row in right)

    def late(query, block, mask, prefix, lengths, *rest):
        return attend(query, block, mask, prefix, lengths - 1, *rest)

    monkeypatch.setattr(kernels.attention, "attend", late)
    assert not any(row["right"] for row in rows(1))
    monkeypatch.setattr(kernels.attention, "attend", attend)
    monkeypatch.setattr(kernels.norm, "add", lambda x, parts, *rest: norm(x, parts * 1.05, *rest))
    assert not any(row["right"] for row in rows(1))
    monkeypatch.setattr(kernels.norm, "add", norm)
    monkeypatch.setattr(device, "usable", lambda *arrays: False)
    with pytest.raises(ValueError, match="--tensor 1: no kernel takes a pass of 8 tokens"):
        agree.main()
    for used in ("17", "113"):
        monkeypatch.setattr(sys, "argv", ["check_kernels.py", "--shape", "tiny", *SLOTS[:3], used])
        with pytest.raises(ValueError, match=f"--used {used}: --cache 128 has room for 18 to 112"):
            agree.main()
    assert not agree.distance([jnp.ones(2), jnp.array([jnp.nan])], [jnp.ones(2)] * 2)[1] <= 1


def test_what_does_not_fit_is_one_line() -> None:
    command = [sys.executable, "benchmarks/step.py", "--shape", "tiny", "--cache", "32"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --used 512: 32 slots hold ")


def test_round() -> None:
    """The parts add up to the round, at a temperature as well."""
    methods = ["eagle", "speculative"]
    options = ["--temperature", "1", "--draft-vocabulary", "40", "--methods", *methods]
    options += ["--quantize-drafts", "int8"]
    result = run("round", *SMALL, *SLOTS, *options)
    assert (result["draft_vocabulary"], result["quantize_drafts"]) == (40, "int8")
    vanilla, *rows = result["rows"]
    assert vanilla["method"] == "vanilla" and vanilla["cost"] == 1
    assert [row["method"] for row in rows] == methods
    assert [row["nodes"] for row in rows] == [26, 6]
    for row in rows:
        parts = [row[name] for name in ("draft", "verify", "accept", "commit")]
        assert sum(parts) == pytest.approx(row["ms"])
        assert row["verify"] > 0
        assert row["cost"] == pytest.approx(row["ms"] / vanilla["ms"])
        assert 1 <= row["tau"] <= 6


def test_every_method_has_a_state(module) -> None:
    """Of the right shapes, before any program is compiled: length and cache are as asked for."""
    programs, loops, shapes = module("round"), module("loops"), module("shapes")
    kinds = {m.draft for m in programs.METHODS.values()} - {None}
    params = shapes.random_params("tiny", sorted(kinds))
    place = loops.Slots(params.target_config, 128, batch=2)
    assert sum(x.nbytes for pair in place.new() for x in pair) == place.nbytes
    for method in programs.METHODS.values():
        method.check(params)
        rounds = loops.Rounds(params, method, place, used=40, rounds=8)
        assert rounds.state.tokens.shape == (2, 128) and rounds.start == 36
        assert all(x.shape[0] == 2 for x in jax.tree.leaves(rounds.state.method))
    assert loops.Rounds(params, Vanilla(), place, used=40, rounds=8, pace=3).start == 28


# --- Several devices -------------------------------------------------------------------------


def test_a_step_of_two_devices_counts_what_one_reads() -> None:
    """Its halves of all matrices and keys, and the norms, which both have whole."""
    options = ["--tokens", "1", "4", "--cache", "128", "--used", "20", "--rounds", "4"]
    result = run("step", *SMALL, *options, "--tensor", "2")
    width, ffn, vocab, layers, heads, kv, size = 64, 96, 256, 2, 4, 2, 16
    matrices = layers * width * (2 * heads * size + 2 * kv * size + 3 * ffn) + width * vocab
    norms = (2 * layers + 1) * width
    assert result["tensor"] == 2
    assert result["weight_bytes"] == 4 * (matrices // 2 + norms)
    assert result["kv_bytes_per_token"] == 4 * 2 * layers * (kv // 2) * size
    for row in result["rows"]:
        read = result["weight_bytes"] + row["used"] * result["kv_bytes_per_token"]
        assert row["GB/s"] == pytest.approx(read / row["ms"] / 1e6)


def test_a_round_of_two_devices_has_its_parts() -> None:
    options = ["--tensor", "2", "--temperature", "1", "--methods", "eagle", "medusa"]
    result = run("round", *SMALL, *SLOTS, *options)
    assert result["tensor"] == 2
    for row in result["rows"][1:]:
        parts = [row[name] for name in ("draft", "verify", "accept", "commit")]
        assert sum(parts) == pytest.approx(row["ms"]) and row["verify"] > 0


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        ("99", "--tensor 99: there are 8 devices; use fewer"),
        ("4", "num_key_value_heads=2: cannot be cut into 4 equal parts (tensor of the mesh); "),
    ],
)
def test_devices_that_cannot_share_are_one_line(tensor: str, said: str) -> None:
    command = [sys.executable, "benchmarks/step.py", "--shape", "tiny", "--tensor", tensor]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(f"error: {said}")


def test_arrays_lie_where_generate_has_them(module) -> None:
    """The same weights as on one device, cut by the tables of `load`; the whole state of every
    method as the prompt's pass leaves it. Nothing that a loop sends is a weight or a cache."""
    programs, loops, shapes = module("round"), module("loops"), module("shapes")
    kinds = sorted({m.draft for m in programs.METHODS.values()} - {None})
    mesh = module("common").mesh(2)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "expert": 1, "tensor": 2}
    params, alone = shapes.random_params("tiny", kinds, mesh=mesh), shapes.random_params("tiny")
    for name, x in params.target.items():
        np.testing.assert_allclose(x, alone.target[name], rtol=1e-6)
    models = [params.target, *(draft.params for draft in params.drafts.values())]
    large = {x.shape for weights in models for x in weights.values() if x.ndim > 1}
    large |= {x.addressable_shards[0].data.shape for w in models for x in w.values() if x.ndim > 1}
    place = loops.Slots(params.target_config, 256, mesh=mesh)
    large |= {(1, heads, 256, 16) for heads in (1, 2)}
    first = place.look()[0][0].addressable_shards[0].data
    assert first.shape == (1, 1, 256, 16)
    assert place.nbytes == 4 * first.nbytes

    for method in programs.METHODS.values():
        rounds = loops.Rounds(params, method, place, used=40, rounds=2)
        rounds()
        state = executables.start(
            rounds.program, rounds.params, [np.arange(5)], [9], [0], executables.Clock()
        )
        ours = {**vars(rounds.state), "cache": place.look()}
        for name, theirs in vars(state).items():
            for own, x in zip(*map(jax.tree.leaves, (ours[name], theirs)), strict=True):
                assert own.sharding.is_equivalent_to(x.sharding, x.ndim), (method, name)
        text = executables.executables()[-2].as_text()  # the last is that of the prompt
        sent = re.findall(r"= \(?\w+\[([\d,]*)\]\S* (?:all-|collective-)[a-z-]+\(", text)
        assert sent and set(aot.collectives(text)) <= {"all-reduce", "all-gather"}
        assert not {tuple(int(n) for n in x.split(",") if n) for x in sent} & large, method


def test_a_draft_that_no_mesh_divides_is_whole(module, monkeypatch) -> None:
    """As `load` places it: catches a small head that keeps two devices from being used at all."""
    shapes = module("shapes")
    odd = shapes._llama(24, 1, 3, 1, 48, 256)
    monkeypatch.setitem(shapes._SMALL, "tiny", odd)
    params = shapes.random_params("tiny", ["model"], mesh=module("common").mesh(2))
    weights = params.drafts["model"].params.values()
    assert all(x.sharding.is_fully_replicated and len(x.devices()) == 2 for x in weights)


def test_70b_fits_two_devices(module) -> None:
    """By shapes alone, of one layer and of two: all are alike. At most 71.5 GB on each device."""
    target, mesh = module("shapes").SHAPES["70b"], module("common").mesh(2)

    def sizes(layers: int) -> np.ndarray:
        like = param_shapes(Transformer, dataclasses.replace(target, num_hidden_layers=layers))
        places = sharding.weight_shardings(mesh, like, stored=False)
        parts = [places[name].shard_shape(x.shape) for name, x in like.items()]
        return np.array(
            [sum(math.prod(x.shape) for x in like.values()), sum(map(math.prod, parts))]
        )

    whole, part = sizes(1) + (target.num_hidden_layers - 1) * (sizes(2) - sizes(1))
    assert whole == 70_553_706_496
    assert 70.5e9 < 2 * part < 71.5e9


# --- Batches ---------------------------------------------------------------------------------


def test_batch() -> None:
    """Every size has its own choice, measured again; nothing calls the acceptance real."""
    options = ["--batch", "2", "1", "--trees", "chain-1", "best-4", "--rates", "0.5", "0.5"]
    out = tiny_pair.run_program("benchmarks/batch.py", *SMALL, *SLOTS, *options)
    result = json.loads(out.splitlines()[-1])
    assert out.startswith("Acceptance is SIMULATED") and result["acceptance"] == "SIMULATED"
    assert result["benchmark"] == "batch" and result["rates"] == {"eagle": [0.5, 0.5]}
    assert {"device", "jax", "jaxlib", "flax", "driver"} <= set(result)
    names = ["vanilla", "eagle chain-1", "eagle best-4"]
    assert [row["method"] for row in result["rows"]] == [*names, "auto"] * 2
    for batch, rows in ((2, result["rows"][:4]), (1, result["rows"][4:])):
        vanilla, chain, best, auto = rows
        assert [row["nodes"] for row in rows[:3]] == [1, 2, 4]
        assert [row["tau by rates"] for row in rows[:3]] == [1, 1.5, pytest.approx(1.875)]
        assert vanilla["simulated tau"] == vanilla["speedup"] == 1
        assert 1 <= chain["simulated tau"] <= 2 and 1 <= best["simulated tau"] <= 3
        for row in rows:
            assert row["batch"] == batch
            pace = 1e3 * batch * row["tau by rates"] / row["ms"]
            assert row["tokens/s"] == pytest.approx(pace)
        for row in rows[:3]:
            assert row["speedup"] == pytest.approx(row["tokens/s"] / vanilla["tokens/s"])
        fastest = max(rows[:3], key=lambda row: row["tokens/s"])
        assert auto["choice"] == fastest["method"] and auto["nodes"] == fastest["nodes"]
        assert auto["speedup"] == 1 or auto["choice"] != "vanilla"


def test_trees_suit_their_batch(module) -> None:
    """Four, of which the last is beyond what weights alone cost, where there is one."""
    batch = module("batch")
    assert batch.suited(1) == batch.suited(8) == ("best-8", "best-16", "best-32", "best-60")
    assert batch.suited(16) == ("chain-4", "best-8", "best-16", "best-32")
    assert batch.suited(32) == ("chain-2", "chain-4", "best-8", "best-16")
    assert batch.suited(1000) == ("chain-2",)
    likely = batch.chances(batch.RATES["eagle"])
    assert {name: batch.tree_of(name, likely).nodes for name in batch.TREES} == batch.TREES


def judged(simulated: ModuleType, name: str, rates: list[float], rows: int = 8000) -> Accepted:
    """What the simulated rule keeps of one round of many rows, each with its own seed."""
    likely = simulated.chances(rates)
    tree = simulated.tree_of(name, likely)
    rule = simulated.Simulated(tree, likely)

    @jax.jit
    def judge(seeds: jax.Array) -> Accepted:
        length = jnp.full(rows, 7, jnp.int32)
        context = Context(
            length[:, None], length, seeds, None, decoding.sampling(rows=rows), tree.depth + 1
        )
        # The target agrees with no drafted token: what is kept is chance alone.
        tokens = jnp.zeros((rows, tree.nodes), jnp.int32)
        targets = jnp.broadcast_to(100 + jnp.arange(tree.nodes, dtype=jnp.int32), tokens.shape)
        proposal = Proposal(tokens, tree.shape(rows))
        return rule(proposal, jnp.zeros((rows, tree.nodes, 1)), targets, context)

    found = judge(jnp.arange(rows, dtype=jnp.uint32))
    again = judge(jnp.arange(rows, dtype=jnp.uint32))
    assert np.array_equal(found.path, again.path)
    path, count = np.asarray(found.path), np.asarray(found.count)
    inside = np.arange(tree.depth + 1) <= count[:, None]
    assert 0 <= count.min() and count.max() <= tree.depth
    assert np.all(path[~inside] == 0) and np.all(path[:, 0] == 0)
    assert np.all((tree.depths[path] == np.arange(tree.depth + 1)) | ~inside)
    assert np.all(tree.parents[path[:, 1:]][inside[:, 1:]] == path[:, :-1][inside[:, 1:]])
    assert np.array_equal(found.emitted[inside], 100 + path[inside])
    tau = simulated.expected(tree, likely)
    assert np.mean(count) + 1 == pytest.approx(tau, abs=5 * np.std(count) / rows**0.5 + 1e-6)
    return found


def test_the_simulated_rule_keeps_what_its_rates_say(module) -> None:
    """Paths of the tree, no deeper than it is, with the right mean; 5 sigma everywhere."""
    simulated = module("simulated")
    assert set(judged(simulated, "chain-3", [1, 1, 1]).count.tolist()) == {3}
    assert set(judged(simulated, "chain-3", [0, 1, 1]).count.tolist()) == {0}
    counts = np.bincount(judged(simulated, "chain-3", [1, 0.5, 1]).count, minlength=4) / 8000
    assert counts[0] == counts[2] == 0 and abs(counts[1] - 0.5) < 0.03
    # Siblings: .5, then half as often where the first was wrong.
    second = np.asarray(judged(simulated, "0 1 3 00 10", [0.5, 0.4]).path)[:, 1]
    shares = np.bincount(second, minlength=4) / 8000
    third = 0.5 * 0.75 * 0.875 * 0.0625
    assert np.allclose(shares, [0.375 - third, 0.5, 0.125, third], atol=0.03)
    for size in ("mc_sim_7b_63", "best-60"):
        judged(simulated, size, list(simulated.RATES["eagle"]))


def test_the_simulated_rule_is_as_published(module) -> None:
    """What --help says that the default rates amount to; what cannot be simulated is refused."""
    simulated = module("simulated")
    likely = simulated.chances(simulated.RATES["eagle"])
    assert all(sum(row) <= 1 and row[1] < row[0] for row in likely)
    for name, tau in (("mc_sim_7b_63", 3.92), ("chain-5", 3.31)):
        assert simulated.expected(simulated.tree_of(name, likely), likely) == pytest.approx(
            tau, abs=0.005
        )
    for name in ("chain-6", "dynamic-5-8-40"):
        with pytest.raises(ValueError, match=f"--trees {name}: "):
            simulated.tree_of(name, likely)


@pytest.mark.parametrize("gpu", [False, True])
def test_models_lie_as_load_lays_them(module, monkeypatch, gpu: bool) -> None:
    """Catches a benchmark of GPUs whose models lie otherwise than those that are loaded there."""
    monkeypatch.setattr(device, "_gpu", lambda: gpu)
    monkeypatch.setattr(module("common"), "default_dtype", lambda: jnp.bfloat16)
    params = module("shapes").random_params("tiny", ["eagle"])
    for model in (params.target, params.drafts["eagle"].params):
        assert any("gate_up_proj" in name for name in model)
        assert any("qkv_proj" in name for name in model) == gpu
    shared = module("shapes").random_params("tiny", mesh=module("common").mesh(2))
    assert any("qkv_proj" in name for name in shared.target) == gpu


def test_a_draft_vocabulary_is_eagles(module) -> None:
    """Catches an option that changes nothing, or EAGLE-3 as well."""
    shapes = module("shapes")
    params = shapes.random_params("tiny", ["eagle", "eagle3"], draft_vocabulary=40)
    eagle, eagle3 = (params.drafts[kind].params for kind in ("eagle", "eagle3"))
    assert eagle["lm_head.kernel"].shape == (64, 40) and eagle3["lm_head.kernel"].shape == (64, 256)
    assert (np.arange(40) + eagle["d2t"]).tolist() == list(range(0, 240, 6))
    with pytest.raises(ValueError, match="draft_vocab_size=257: must be 1 to vocab_size=256"):
        shapes.draft_configs("tiny", 257)


def test_small_drafts_are_those_that_load_makes(module) -> None:
    """Catches EAGLE-1 without the head that it has then, and a target that changes with it."""
    kinds = ["eagle", "eagle3", "medusa", "model"]
    params = module("shapes").random_params("tiny", kinds, quantize_drafts="int8")
    assert (params.quantize, params.quantize_drafts) == (None, "int8")
    assert all(x.dtype != jnp.int8 for x in params.target.values())
    eagle = params.drafts["eagle"].params
    assert (eagle["lm_head.kernel"].dtype, eagle["d2t"].any()) == (jnp.int8, False)
    for draft in params.drafts.values():
        kernels = [x for name, x in draft.params.items() if name.endswith("kernel")]
        assert kernels and all(x.dtype == jnp.int8 for x in kernels)


def test_a_fixed_tree_has_the_size_it_is_asked_for(module) -> None:
    fixed_tree = module("round").fixed_tree
    for nodes, depth in ((1, 0), (2, 1), (6, 5), (26, 5), (60, 6)):
        tree = fixed_tree(nodes, depth)
        assert (tree.nodes, tree.depth) == (nodes, depth)
        assert all(tree.parents <= np.arange(nodes))


def test_train() -> None:
    options = ["--sequence", "16", "--batch", "2", "--steps", "1"]
    result = run("train", *SMALL, *options, "--objectives", "eagle", "medusa")
    assert [row["objective"] for row in result["rows"]] == ["eagle", "medusa"]
    for row in result["rows"]:
        assert row["tokens/s"] == pytest.approx(32e3 / row["ms"])
        assert row["TFLOP/s"] > 0 and row["MFU"] is None  # no peak is known of CPUs


def test_baselines() -> None:
    """Processes of their own, in turn; one that cannot run is left out."""
    contenders = ["--contenders", "eagle-jax", "torch-eager"]
    result = run("baselines", *SMALL, *SLOTS, *contenders)
    ours, torch = result["rows"]
    assert ours["over ours"] == 1 and torch["over ours"] == pytest.approx(torch["ms"] / ours["ms"])
    assert "jax" in ours["versions"] and "torch" in torch["versions"]


def test_a_missing_torch_is_one_line(tmp_path) -> None:
    """-S: an interpreter without any installed package."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    command = [sys.executable, "benchmarks/baselines.py", "--shape", "tiny"]
    command += ["--contenders", "torch-eager", "--torch-python", str(python)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    left_out, error = done.stderr.splitlines()[-2:]
    assert left_out.startswith("left out torch-eager: error: torch is not installed for ")
    assert error == "error: no contender ran; the lines above say why"


def row(method: str, speedup: float, **more: Any) -> dict[str, Any]:
    same = {"task": "own", "category": "", "temperature": 0.0, "guarantee": "exact"}
    return {**same, "method": method, "speedup": speedup, **more}


def test_pair_compares_the_best_of_each_family(tmp_path) -> None:
    """Lossy methods, other families and single categories do not count."""
    methods = {
        "a": "Eagle(tree=...)",
        "b": "Eagle(tree=..., head='eagle3')",
        "c": "EagleLookup(...)",
        "d": "Medusa(...)",
        "e": "Medusa(rule=Typical())",
        "f": "Lookahead(...)",
    }
    rows = [row(name, speed) for name, speed in zip("abcf", (2.0, 3.0, 9.0, 1.5), strict=True)]
    rows += [row("a", 8.0, category="math"), row("e", 7.0, guarantee="lossy"), row("d", 2.0)]
    rows += [row("a", 1.2, temperature=1.0), row("f", 1.5, temperature=1.0)]
    versions = dict.fromkeys(("device", "dtype", "jax", "jaxlib", "flax"), "x")
    result = {"config": {"methods": methods, "model": "m"}, "rows": rows, "lossless": True}
    (tmp_path / "results.json").write_text(json.dumps(result | {"environment": versions}))
    greedy, sampled = run("pair", "--results", str(tmp_path / "results.json"))["rows"]
    assert (greedy["eagle"], greedy["lookahead"], greedy["medusa"]) == ("b", "f", "d")
    assert (greedy["over lookahead"], greedy["over medusa"]) == (2.0, 1.5)
    assert sampled["over lookahead"] == pytest.approx(0.8) and sampled["over medusa"] is None


def test_large_pair_plans_by_the_clock_and_goes_on(module, tmp_path, monkeypatch) -> None:
    """Trainings whose speed is known are not measured again, what is trained is not repeated."""
    large_pair = module("large_pair")
    calls: list[list[str]] = []

    def call(*command: str) -> str:
        calls.append(list(command))
        names = ("target", "eagle", "eagle3", "medusa")
        return json.dumps({"rows": [{"objective": name, "ms": 540.0} for name in names]})

    monkeypatch.setattr(large_pair, "call", call)
    out = tmp_path / "out"
    files = [tmp_path / "text.jsonl", tmp_path / "held_out.jsonl"]
    options = ["--data", str(files[0]), "--validation", str(files[1]), "--output", str(out)]
    options += ["--target-minutes", "6", "--draft-minutes", "3", "--set", "attention=xla"]
    monkeypatch.setattr(sys, "argv", ["large_pair.py", *options, "--prompts", "7"])

    for file in files:
        with pytest.raises(ValueError, match=rf"--(data|validation) {file}: there is no such file"):
            large_pair.main()
        file.touch()
    large_pair.main()
    programs = ["benchmarks/train.py", "train/pair.py", "benchmarks/pair.py"]
    assert [command[0] for command in calls] == programs
    assert calls[1][-2:] == ["--prompts", "7"] and "--target" not in calls[1]
    config = settings.load(out / "configs" / "target.py", kind=TrainConfig)
    assert (config.optim.steps, config.eval_every, config.checkpoint_every) == (600, 150, 200)
    assert settings.load(out / "configs" / "eagle3.py", kind=TrainConfig).optim.steps == 300
    assert settings.load(out / "configs" / "eval.py", kind=EvalConfig).limit == 10

    calls.clear()
    (out / "target" / "export").mkdir(parents=True)
    (out / "model" / "eagle").mkdir(parents=True)
    large_pair.main()
    assert [command[0] for command in calls] == programs[1:]
    drafts = calls[0].index("--drafts")
    assert calls[0][drafts + 1 : drafts + 3] == ["eagle3", "medusa"]
    assert calls[0][calls[0].index("--target") + 1] == str(out / "target" / "export")


def test_what_is_stopped_saves_first(module, tmp_path) -> None:
    """A signal reaches grandchildren, and the end of the last of them is waited for."""
    slow = "import signal, sys, time, pathlib\n"
    slow += "def stop(*_): time.sleep(0.5); print('saved', flush=True); sys.exit(143)\n"
    slow += "signal.signal(signal.SIGTERM, stop)\nprint('ready', flush=True)\ntime.sleep(60)\n"
    (tmp_path / "slow.py").write_text(slow)
    middle = "import subprocess, sys\nsubprocess.run([sys.executable, sys.argv[1]])\n"
    (tmp_path / "middle.py").write_text(middle)
    outer = f"import sys\nsys.path.insert(0, {str(FOLDER)!r})\nimport large_pair\n"
    outer += f"large_pair.call(*{[str(tmp_path / f'{x}.py') for x in ('middle', 'slow')]!r})\n"
    lines = []
    command = [sys.executable, "-c", outer]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.strip())
            if line.strip() == "ready":
                process.terminate()
    assert lines[1:] == ["ready", "saved"] and process.returncode == 143


def suite(output: Path, commands: str, *options: str) -> subprocess.Popen[str]:
    """benchmarks/suite.py with a set of a test's own, whose programs lie beside `output`."""
    program = f"import sys\nsys.path.insert(0, {str(FOLDER)!r})\nimport common, suite\n"
    program += f"suite.SETS['tiny'] = {commands!r}\ncommon.run(suite.main)\n"
    command = [sys.executable, "-c", program, "--set", "tiny", "--output", str(output), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def runs(pid: str) -> bool:
    """Whether there is such a process, and it is none that only waits to be counted."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_suite_goes_on_where_it_was(tmp_path) -> None:
    """Catches work that is repeated or lost, and a child that outlives its limit."""
    good = "import json, os\nseen = {k: v for k, v in os.environ.items() if '_CACHE_' in k}\n"
    good += "print(json.dumps({'rows': [{'ms': 2.5}, {'ms': None}], 'environment': seen}))\n"
    slow = "import subprocess, sys\nprint('begun', flush=True)\n"
    slow += "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'])\n"
    slow += "print(child.pid, flush=True)\nchild.wait()\n"
    programs = {"good": good, "bad": "raise SystemExit('error: no memory')\n", "slow": slow}
    folder = os.path.relpath(tmp_path, FOLDER)
    lines = []
    for name, limit in (("good", 60), ("bad", 60), ("slow", 2)):
        (tmp_path / f"{name}.py").write_text(programs[name])
        lines.append(f"{name} {limit} {folder}/{name}.py --shape '7 b'")
    lines.append(f"long 600 {folder}/good.py")
    output = tmp_path / "out"

    def statuses(*options: str) -> tuple[list[str], dict[str, str], int]:
        process = suite(output, "\n".join(lines), *options)
        text, _ = process.communicate(timeout=120)
        said = text.splitlines()
        rows = json.loads(said[-1])["rows"]
        return said, {row["name"]: row["status"] for row in rows}, process.returncode

    said, found, code = statuses("--minutes", "5")
    assert found == {"good": "done", "bad": "failed", "slow": "overran", "long": "left"}
    assert code == 1
    assert re.fullmatch(r"good: done, [\d.]+ s: 2.5 ms", said[0])
    assert re.fullmatch(r"bad: failed, [\d.]+ s: error: no memory", said[1])
    assert said[2].startswith("slow: overran, ")
    assert said[3].startswith("long: left, its limit is 600 s and ")
    begun, child = (output / "slow.out").read_text().split()
    assert begun == "begun" and not runs(child)
    entries = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    assert [entry["status"] for entry in entries] == ["done", "failed", "overran"]
    assert entries[0]["command"] == f"benchmarks/{folder}/good.py --shape '7 b'"
    seen = entries[0]["result"]["environment"]  # what is set is kept, the rest is added
    assert seen["JAX_COMPILATION_CACHE_DIR"] == os.environ["JAX_COMPILATION_CACHE_DIR"]
    assert seen["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] == "-1"
    assert entries[1]["result"] is None and entries[2]["seconds"] >= 2

    (tmp_path / "bad.py").write_text(good)
    with (output / "results.jsonl").open("a") as file:
        file.write('5\n{"name": "cut o')
    _, found, code = statuses("--only", "good", "bad", "long")
    assert found == {"good": "done before", "bad": "done", "long": "done"} and code == 0
    assert len((output / "results.jsonl").read_text().splitlines()) == 7
    _, found, _ = statuses("--only", "bad", "long")  # what came after the line that was cut off
    assert set(found.values()) == {"done before"}


def test_a_suite_that_is_stopped_stops_its_command(tmp_path) -> None:
    """Catches a benchmark that keeps the GPU after the suite is gone."""
    slow = "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(99)\n"
    (tmp_path / "slow.py").write_text(slow)
    process = suite(tmp_path / "out", f"slow 60 {os.path.relpath(tmp_path, FOLDER)}/slow.py")
    said, deadline = tmp_path / "out" / "slow.out", time.monotonic() + 60
    while not (said.exists() and said.read_text().endswith("\n")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 130 and not runs(said.read_text().strip())


def test_the_suites_commands_are_understood(module, monkeypatch) -> None:
    """Catches an option that a benchmark no longer has, before a GPU waits for the message."""

    class Understood(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def only_parse(parser: argparse.ArgumentParser) -> None:
        parse(parser)
        raise Understood

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
    sets = module("suite").SETS
    for line in "\n".join(text.strip() for text in sets.values()).split("\n"):
        _, limit, program = line.split(None, 2)
        assert float(limit) > 0
        monkeypatch.setattr(sys, "argv", program.split())
        with pytest.raises(Understood):
            module(program.split(".py")[0]).main()


def test_suite(tmp_path) -> None:
    """The tiny set, as it is run by hand."""
    command = [sys.executable, "benchmarks/suite.py", "--set", "tiny", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    result = json.loads(done.stdout.splitlines()[-1])
    assert [row["status"] for row in result["rows"]] == ["done", "done"]
    entries = [json.loads(x) for x in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [entry["result"]["benchmark"] for entry in entries] == ["step", "train"]
    done = subprocess.run([*command, "--only", "stop"], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "error: --only stop: --set tiny has step, train"


def test_every_benchmark_teaches() -> None:
    """--help is the docstring, which begins with what is measured and how to call it."""
    programs = set(FOLDER.glob("*.py")) - {FOLDER / f"{name}.py" for name in HELPERS}
    assert len(programs) == 10
    for path in programs:
        assert any(f"python benchmarks/{path.name}" in x for x in path.read_text().splitlines()[:8])
    done = subprocess.run(
        [sys.executable, "benchmarks/step.py", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert "Measures the target's pass over T tokens" in done.stdout and not done.stderr
