"""`python -m eagle_jax.convert`: round trips lose no bit, and what fails leaves nothing behind."""

import collections
import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tiny_run
import torch
from model_directories import assert_same, edit, message, retensor

import eagle_jax
from eagle_jax import convert
from eagle_jax.checkpoint import export, files, hf, manifest, safetensors
from eagle_jax.config import Eagle3Config, EagleConfig, RopeScaling, TransformerConfig
from eagle_jax.drafters import registry
from eagle_jax.params import find
from eagle_jax.text import Tokenizer, read_conversations

KINDS = ("eagle", "eagle3", "medusa", "model")


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    """A copy to damage, without the manifest of a native directory."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def tensors(directory: Path) -> dict[str, np.ndarray]:
    return files.in_memory(files.read_tensors(directory))


def settings(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())


def inside(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_target_to_native_and_back(model, tmp_path):
    """Catches a key, a tokenizer file or a bit of a weight that is lost on the way."""
    edit(model / "target", transformers_version="5.1", pad_token_id=7)
    convert.convert(model / "target", tmp_path / "native", "native")
    assert inside(tmp_path / "native") == ["eagle_jax.json", "target"]
    convert.convert(tmp_path / "native", tmp_path / "back", "hf")
    assert settings(tmp_path / "back") == settings(model / "target")
    index = "model.safetensors.index.json"  # for the official EAGLE code
    assert inside(tmp_path / "back") == sorted([*inside(model / "target"), index])
    assert_same(tensors(tmp_path / "back"), tensors(model / "target"))


def test_targets_in_torch_files_and_shards(model, tmp_path):
    """Catches a source that is read in part, and shards of torch that are not read at all."""
    source = model / "target"
    expected = tensors(source)
    parts = [dict(list(expected.items())[i::2]) for i in (0, 1)]
    names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    (source / "model.safetensors").unlink()
    for name, part in zip(names, parts, strict=True):
        torch.save({key: torch.tensor(x) for key, x in part.items()}, source / name)
    convert.convert(source, tmp_path / "one", "hf")
    assert_same(tensors(tmp_path / "one"), expected)
    where = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    convert.convert(source, tmp_path / "two", "hf", dtype="bfloat16")
    assert {str(x.dtype) for x in tensors(tmp_path / "two").values()} == {"bfloat16"}
    assert settings(tmp_path / "two")["dtype"] == "bfloat16"


@pytest.mark.filterwarnings("ignore:.*the official code knows no layers")
@pytest.mark.parametrize("kind", ["eagle", "eagle3", "medusa"])
@pytest.mark.parametrize("layout", ["official", "sglang", "speculators"])
def test_drafts_go_round(model, tmp_path, kind, layout):
    """Catches a bit lost between official, native, and a serving stack's layout."""
    if kind == "medusa" and layout != "official" or (kind, layout) == ("eagle", "speculators"):
        text = message(convert.convert, model, tmp_path / "there", layout, kind=kind)
        assert f"draft: kind {kind!r} has no layout in {layout}" in text
        return
    config, params = hf.load_draft(model / kind)
    convert.convert(model, tmp_path / "there", layout, kind=kind)
    convert.convert(tmp_path / "there", tmp_path / "native", "native", target=model / "target")
    convert.convert(tmp_path / "native", tmp_path / "back", "official")
    found, again = hf.load_draft(tmp_path / "back")
    assert found == config
    assert_same(again, params)
    beside = tensors(tmp_path / "back").get("embed_tokens.weight")
    if kind == "eagle":  # the official loader refuses heads without
        embedding = tensors(model / "target")["model.embed_tokens.weight"]
        np.testing.assert_array_equal(beside, embedding)
    else:
        assert beside is None


def test_an_independent_draft_as_a_model(model, tmp_path):
    """Catches a pair of which only the target can be had back."""
    cases: list[tuple[Path, dict[str, Any]]] = [(model, {"kind": "model"}), (model / "model", {})]
    for source, options in cases:
        shutil.rmtree(tmp_path / "new", ignore_errors=True)
        convert.convert(source, tmp_path / "new", "hf", **options)
        assert_same(tensors(tmp_path / "new"), tensors(model / "model"))


def test_what_a_killed_run_left(model, tmp_path):
    """Catches half a draft that is loaded as one, or stays for ever."""
    for directory in (model, tmp_path):
        shutil.copytree(model / "medusa", directory / ".new.0123abcd.tmp")
    (model / ".git").mkdir()
    (model / ".git" / "config.json").write_text("[]")
    assert sorted(eagle_jax.load(model).drafts) == sorted(KINDS)
    convert.convert(model, tmp_path / "new", "native")
    assert inside(tmp_path) == ["model", "new"]


def test_the_manifest_lists_the_drafts(model, tmp_path):
    """Catches drafts that come and go without it, and kinds that it has wrong."""
    convert.convert(model, tmp_path / "new", "native")
    shutil.copytree(model / "medusa", tmp_path / "new" / "more")
    assert "new/more: is not in eagle_jax.json; move it" in message(
        eagle_jax.load, tmp_path / "new"
    )
    shutil.rmtree(tmp_path / "new" / "more")
    path = tmp_path / "new" / "eagle_jax.json"
    path.write_text(path.read_text().replace('"kind": "medusa"', '"kind": "eagle9"'))
    assert "lists drafts of kind eagle, eagle3, eagle9, model, the" in message(
        eagle_jax.load, tmp_path / "new"
    )
    for wrong in ("{}", '{"target": 1}', '{"target": {"kind": "target", "files": {"a": 1}}}'):
        path.write_text('{"format": "eagle_jax", "version": 1, "parts": ' + wrong + "}")
        assert "is no manifest of eagle_jax" in message(eagle_jax.load, tmp_path / "new")


def test_corruption_is_not_converted(model, tmp_path, monkeypatch):
    """Catches a new manifest for bytes that differ from the old one's."""
    convert.convert(model, tmp_path / "new", "native")
    monkeypatch.setattr(manifest, "_QUICK", 0)
    path = tmp_path / "new" / "target" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"@")
    eagle_jax.load(tmp_path / "new")  # sizes only
    text = message(convert.convert, tmp_path / "new", tmp_path / "again", "native")
    assert "model.safetensors: differs from the file that eagle_jax.json lists" in text


def test_sixteen_bits_of_two_kinds(model, tmp_path):
    """Catches weights that are rounded because others have another dtype, and a readback that
    compares with what was rounded."""
    half = ml_dtypes.bfloat16

    def change(x):
        x["fc.weight"] = (x["fc.weight"] * 1e-7).astype(half)  # far below what float16 holds
        x["fc.bias"] = x["fc.bias"].astype(np.float16)

    retensor(model / "eagle", change)
    params = hf.load_draft(model / "eagle")[1]
    convert.convert(model, tmp_path / "new", "official", kind="eagle")
    found = hf.load_draft(tmp_path / "new")[1]
    assert {str(x.dtype) for x in found.values()} == {"float32"}
    for name, array in params.items():
        np.testing.assert_array_equal(found[name], array.astype(np.float32))


def test_numbers_too_large_for_a_dtype(model, tmp_path):
    """Catches infinite weights that are reported as a success."""
    for part, name in (("target", "model.norm.weight"), ("eagle", "fc.bias")):
        retensor(model / part, lambda x, name=name: x.update({name: x[name] + 1e6}))
    options = {"dtype": "float16"}
    said = "has numbers that are too large for float16; take bfloat16 or float32"
    text = message(convert.convert, model, tmp_path / "new", "hf", **options)
    assert text == f"model.norm.weight: {said}"
    text = message(convert.convert, model, tmp_path / "new", "sglang", kind="eagle", **options)
    assert text == f"fc.bias: {said}"
    convert.convert(model, tmp_path / "new", "hf", dtype="bfloat16")


def test_what_the_official_code_cannot_say(model, tmp_path):
    """Catches a head that its authors' code opens and computes otherwise, without a word."""
    said = "knows no layers .* the authors' drafts otherwise or not at all"
    with pytest.warns(UserWarning, match=said) as told:
        convert.convert(model, tmp_path / "new", "official", kind="eagle3")
    assert len(told) == 1 and "\n" not in str(told[0].message)
    text = message(convert.convert, model / "eagle", tmp_path / "none", "official")
    assert "has no embed_tokens.weight, without which the official code does not open" in text


@pytest.mark.parametrize(
    ("config", "changes", "features"),
    [
        (Eagle3Config, {"aux_layers": (2, 3, 4)}, []),
        (Eagle3Config, {"fc_norm": True, "norm_output": True}, ["fc_norm=True", "norm_output"]),
        (Eagle3Config, {"attention_bias": True}, ["qkv_bias=True"]),
        (EagleConfig, {"attention_bias": True}, []),
        (EagleConfig, {"rope_scaling": RopeScaling("linear", 2.0)}, []),
        (EagleConfig, {"rope_scaling": RopeScaling("yarn", 2.0, 64)}, ["rope_scaling 'yarn'"]),
        (EagleConfig, {"head_dim": 16}, ["head_dim=16"]),
    ],
)
def test_features_of_official_heads(config, changes, features):
    """Catches a feature that is not told, and one that is told though its code has it."""
    sizes: dict[str, Any] = {"vocab_size": 9, "hidden_size": 24, "intermediate_size": 8}
    sizes |= {"num_attention_heads": 3}
    sizes |= {"num_key_value_heads": 1, "head_dim": 8}
    target = TransformerConfig(**sizes, num_hidden_layers=7)
    if config is Eagle3Config:
        sizes |= {"draft_vocab_size": 5, "aux_layers": (2, 3, 4)}
    draft = config(**{**sizes, **changes})
    found = registry.by_config(draft).checkpoint().unsaid(draft, target)
    assert len(found) == len(features) and all(map(str.startswith, found, features))


def test_medusa_in_the_published_layout(model, tmp_path):
    """Catches files that the published loader does not look for, or lacks the target's name of."""
    edit(model / "medusa", base_model_name_or_path="a/target")
    convert.convert(model, tmp_path / "new", "official", kind="medusa")
    assert inside(tmp_path / "new") == ["config.json", "medusa_lm_head.safetensors"]
    assert settings(tmp_path / "new")["base_model_name_or_path"] == "a/target"
    convert.convert(model, tmp_path / "native", "native")
    assert inside(tmp_path / "native" / "medusa") == ["config.json", "model.safetensors"]


def test_names_that_cannot_be_made(model, tmp_path, monkeypatch):
    """Catches a message about a temporary file that the user never heard of."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    monkeypatch.chdir(tmp_path / "empty")
    for to in (".", "..", tmp_path / "link", tmp_path / "dangling"):
        assert f"{to}: is no name for a new directory" in message(convert.convert, model, to, "hf")
    with pytest.raises(OSError, match="Not a directory|File exists") as info:
        convert.convert(model, model / "target" / "config.json" / "new", "hf")
    assert info.value.filename == str(model / "target" / "config.json" / "new")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert convert.convert(model, "~/new", "hf")["to"] == str(tmp_path / "new")


def test_ended_from_outside(model, tmp_path):
    """Catches a staging directory that stays when a scheduler ends the run."""
    program = (
        "import os, runpy, signal, sys; from eagle_jax.checkpoint import manifest; "
        "manifest.write_manifest = lambda *x: os.kill(os.getpid(), signal.SIGTERM); "
        "runpy.run_module('eagle_jax.convert', run_name='__main__')"
    )
    arguments = ["--from", str(model), "--to", str(tmp_path / "new"), "--format", "native"]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True)
    assert done.returncode == 143, done.stderr
    assert inside(tmp_path) == ["model"]


def test_the_name_of_the_target(model, tmp_path):
    """Catches a path of this machine in a file for others."""
    shutil.copytree(model / "target", tmp_path / "Big-8B")
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (model, {}, "model"),
        (tmp_path / "Big-8B", {}, "Big-8B"),
        (model, {"target_name": "some/Big"}, "some/Big"),
    ]
    for target, options, name in cases:
        shutil.rmtree(tmp_path / "new", ignore_errors=True)
        source, to = model / "eagle3", tmp_path / "new"
        convert.convert(source, to, "speculators", target=target, **options)
        assert settings(to)["speculators_config"]["verifier"]["name_or_path"] == name


def test_native_is_what_load_opens(model, tmp_path):
    """Catches a directory that load() cannot read, or whose models are others."""
    given = [model / kind for kind in KINDS]
    summary = convert.convert(model / "target", tmp_path / "native", "native", draft=given)
    assert summary["kinds"] == ["target", *KINDS]
    found, expected = eagle_jax.load(tmp_path / "native"), eagle_jax.load(model)
    assert sorted(found.drafts) == sorted(expected.drafts)
    for kind, draft in expected.drafts.items():
        assert found.drafts[kind].config == draft.config
        for name, array in draft.params.items():
            np.testing.assert_array_equal(found.drafts[kind].params[name], array)


def test_the_command(model, tmp_path):
    """Catches output that is no JSON line, errors with a traceback, and help that says nothing."""

    def command(*arguments):
        program = [sys.executable, "-m", "eagle_jax.convert", *map(str, arguments)]
        return subprocess.run(program, capture_output=True, text=True)

    done = command(
        "--from", model, "--kind", "eagle3", "--to", tmp_path / "x", "--format", "sglang"
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["format"] == "sglang" and summary["kinds"] == ["eagle3"]
    assert "eagle3 -> sglang: 100%" in done.stderr
    done = command("--from", model, "--to", tmp_path / "x", "--format", "hf")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {tmp_path / 'x'}: exists and is not empty")
    done = command("--help")
    for word in ("--inspect", "speculators", "vLLM", "examples:", "native"):
        assert word in done.stdout


def said(capsys, *arguments) -> tuple[str, dict]:
    convert.main([str(x) for x in arguments])
    out = capsys.readouterr().out
    return out, json.loads(out.splitlines()[-1])


def test_inspect(model, tmp_path, capsys):
    """Catches a description without what a user must know before loading."""
    out, found = said(capsys, "--inspect", model)
    assert list(found) == ["target", *KINDS, "manifest"]
    eagle3 = hf.load_draft(model / "eagle3")[0]
    assert isinstance(eagle3, Eagle3Config)
    size = f"{eagle3.draft_vocab_size} of {eagle3.vocab_size} tokens (66.5%)"
    assert found["eagle3"]["draft vocabulary"] == size and size in out
    assert found["eagle3"]["coverage of the training text"] == "not recorded"
    count = sum(x.size for x in hf.load_target(model / "target")[1].values())
    assert found["target"]["parameters"] == count and found["target"]["family"] == "llama"
    assert found["target"]["dtypes"] == {"float32": found["target"]["tensors"]}
    retensor(model / "eagle3", lambda x: [x.pop("d2t"), x.pop("t2d")])
    edit(model / "eagle3", target_hidden_size=64, eagle_aux_hidden_state_layer_ids="absent")
    _, found = said(capsys, "--inspect", model / "eagle3")
    lacks = " ".join(found["."]["lacks"])
    assert "d2t" in lacks and "eagle_aux_hidden_state_layer_ids (follows" in lacks
    assert "has no eagle_aux_hidden_state_layer_ids" in found["."]["cannot be loaded"]
    edit(model / "eagle3", eagle_aux_hidden_state_layer_ids=[0, 1, 2], draft_vocab_coverage="x")
    _, found = said(capsys, "--inspect", model / "eagle3")
    assert "lacks tensors embed_tokens.weight" in found["."]["cannot be loaded"]


def test_arguments(model, tmp_path):
    """Catches a call that does something else than was asked for."""
    to = tmp_path / "to"
    assert "from: give --from" in message(convert.main, ["--to", str(to)])
    for option in ("--to x", "--draft x", "--kind x", "--dtype float16", "--text x"):
        said = message(convert.main, ["--inspect", "tiny", *option.split()])
        assert "inspect: goes with --target only" in said
    assert "format='x': must be one of hf, official" in message(convert.convert, model, to, "x")
    text = message(convert.convert, model, to, "official")
    assert "several drafts (eagle, eagle3, medusa, model); choose one with --kind" in text
    text = message(convert.convert, model, to, "official", kind="hydra")
    assert "kind='hydra': the source has 0 such drafts" in text
    text = message(convert.convert, model / "eagle", to, "hf")
    assert "is a draft of kind 'eagle', format 'hf' is for whole models" in text
    for options in ({"target": model / "target"}, {"draft": [model / "eagle"]}):
        text = message(convert.convert, model / "model", to, "hf", **options)
        assert f"{[*options][0]}: format 'hf' writes --from alone; leave --" in text
    assert "format 'hf' is for whole" in message(convert.convert, model, to, "hf", kind="eagle")
    assert "takes all drafts" in message(convert.convert, model, to, "native", kind="eagle")
    text = message(convert.convert, model, to, "official", target=model / "target")
    assert f"target: {model} has a target of its own; leave --target out" in text
    text = message(convert.convert, model / "target", to, "official")
    assert f"{model / 'target'}: is a target without drafts; give the draft with --from" in text
    text = message(convert.convert, model / "eagle3", to, "official", target=model / "eagle")
    assert f"target: {model / 'eagle'} is a draft of kind 'eagle'; give its target" in text
    assert "is a draft of kind" in message(convert.inspect, model / "eagle3", model / "eagle")
    assert "leave --target out" in message(convert.inspect, model, model / "target")
    text = message(convert.convert, model / "eagle", to, "native")
    assert "give its target with --target" in text
    assert "dtype='int8'" in message(convert.convert, model, to, "hf", dtype="int8")
    text = message(convert.convert, model, to, "sglang", kind="eagle", target_name="a/b")
    assert "target_name='a/b': only format 'speculators' says it" in text
    assert not to.exists()


def damaged(name):
    def change(model: Path) -> str:
        (model / "target" / name).write_bytes((model / "target" / name).read_bytes()[:-9])
        return "truncated or corrupt"

    return change


def shard_lost(model: Path) -> str:
    target = model / "target"
    (target / "model.safetensors").rename(target / "model-00002-of-00003.safetensors")
    shutil.copy(target / "model-00002-of-00003.safetensors", target / "other.safetensors")
    return "lacks model-00001-of-00003.safetensors, though there are others; download it"


def indexed_shard_lost(model: Path) -> str:
    target = model / "target"
    index = {"weight_map": {"a": "model-00007-of-00009.safetensors"}}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return "lacks model-00007-of-00009.safetensors, which model.safetensors.index.json lists"


def tensor_of_index_lost(model: Path) -> str:
    target = model / "target"
    names = dict.fromkeys([*tensors(target), "model.more.weight"], "model.safetensors")
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return "lacks tensors model.more.weight, which model.safetensors.index.json lists"


def path_out_of_the_directory(model: Path) -> str:
    index = {"weight_map": {"a": "../eagle/model.safetensors"}}
    (model / "target" / "model.safetensors.index.json").write_text(json.dumps(index))
    return "names a shard '../eagle/model.safetensors'"


def unknown_architecture(model: Path) -> str:
    edit(model / "target", model_type="mamba")
    return "model_type='mamba' is not supported; known: llama, "


def wrong_shape(model: Path) -> str:
    retensor(model / "target", lambda x: x.update({"model.norm.weight": np.zeros(31, np.float32)}))
    return "model.norm.weight has shape (31,), the configuration implies (32,)"


def code(model: Path) -> str:
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(model / "mark"),)

    (model / "target" / "model.safetensors").unlink()
    torch.save({"x": Evil()}, model / "target" / "pytorch_model.bin")
    return "pickle with code in it (posix.mkdir): refused"


def no_d2t(model: Path) -> str:
    retensor(model / "eagle3", lambda x: x.pop("d2t"))
    return "has no d2t, though draft_vocab_size="


def other_target(model: Path) -> str:
    edit(model / "medusa", vocab_size=261)
    retensor(
        model / "medusa",
        lambda x: x.update({n: np.zeros((261, 32), np.float32) for n in x if "linear" not in n}),
    )
    return "vocab_size: the target has 260, the draft 261; give a draft that was trained for this"


def other_tokenizer(model: Path) -> str:
    content = json.loads((model / "target" / "tokenizer.json").read_text())
    content["added_tokens"][0]["content"] = "<other>"
    (model / "eagle" / "tokenizer.json").write_text(json.dumps(content))
    return "is '<other>', in the target's tokenizer "


BAD = [
    damaged("model.safetensors"),
    shard_lost,
    indexed_shard_lost,
    tensor_of_index_lost,
    path_out_of_the_directory,
    unknown_architecture,
    wrong_shape,
    code,
    no_d2t,
    other_target,
    other_tokenizer,
]


@pytest.mark.parametrize("damage", BAD)
def test_bad_input(model, tmp_path, damage):
    """Catches a traceback, a conversion that goes on without a part, and files left behind."""
    expected = damage(model)
    before = inside(tmp_path)
    assert expected in message(convert.convert, model, tmp_path / "new", "native")
    assert expected in message(eagle_jax.load, model)
    assert inside(tmp_path) == before
    assert not (model / "mark").exists()


class FullDisk:
    """A file on a disk that is full after some bytes."""

    def __init__(self, file, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


@pytest.mark.filterwarnings("ignore:.*the official code knows no layers")
@pytest.mark.parametrize("layout", convert.FORMATS)
@pytest.mark.parametrize("room", [0, 30_000])
def test_a_full_disk(model, tmp_path, monkeypatch, capsys, layout, room):
    """Catches a directory that looks complete and is not, or a message without the file's name."""

    def full(path, mode):
        return FullDisk(open(path, mode), room)

    monkeypatch.setattr(safetensors, "open", full, raising=False)
    with pytest.raises(OSError, match="No space left on device") as info:
        kind = "eagle3" if layout in export.LAYOUTS else None
        convert.convert(model, tmp_path / "a" / "new", layout, kind=kind)
    assert str(info.value.filename).endswith(("model.safetensors", "config.json"))
    assert inside(tmp_path) == ["model"]


def test_no_permission(model, tmp_path, monkeypatch):
    """Catches a traceback, and an unfinished directory that stays."""
    place = tmp_path / "locked"
    place.mkdir()
    if os.geteuid() == 0:  # root may write everywhere
        make = Path.mkdir

        def refuse(self, *arguments, **options):
            if self.parent == place:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
            return make(self, *arguments, **options)

        monkeypatch.setattr(Path, "mkdir", refuse)
    else:
        place.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(PermissionError) as info:
        convert.convert(model, place / "new", "hf")
    assert str(info.value.filename).startswith(str(place))
    assert inside(place) == []
    with pytest.raises(OSError, match="Not a directory|File exists"):
        convert.convert(model, model / "target" / "config.json" / "new", "hf")


def test_a_crash_in_the_middle(model, tmp_path, monkeypatch):
    """Catches a manifest that is written first: half a model would count as a whole one."""

    def crash(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(manifest, "write_manifest", crash)
    with pytest.raises(KeyboardInterrupt):
        convert.convert(model, tmp_path / "new", "native")
    assert inside(tmp_path) == ["model"]


def test_a_foreign_embedding_is_not_exported(model, tmp_path):
    """Catches an embedding of random numbers beside a head: serving stacks would use it."""
    wrong = np.random.default_rng(0).normal(size=(260, 32)).astype(np.float32)
    retensor(model / "eagle", lambda x: x.update({"embed_tokens.weight": wrong}))
    for layout in ("official", "sglang", "native"):
        kind = None if layout == "native" else "eagle"
        text = message(convert.convert, model, tmp_path / "new", layout, kind=kind)
        assert "its embed_tokens.weight is not the target's; give the target that" in text
    assert not (tmp_path / "new").exists()


TEXT = Path(__file__).parents[1] / "train" / "sample" / "conversations.jsonl.gz"


def test_a_draft_vocabulary_of_the_shipped_head(tmp_path, capsys):
    """Catches tokens that are not the most frequent of the answers, columns of the target in the
    file, and weights that change on the way."""
    shipped = find("tiny")
    arguments = ["--draft-vocabulary", 2048, "--text", TEXT]
    out, found = said(
        capsys, "--from", shipped / "eagle", "--target", "tiny", "--to", tmp_path / "x", *arguments
    )
    assert inside(tmp_path / "x") == ["config.json", "model.safetensors"]
    tokenizer, counts = Tokenizer.load(shipped / "target"), collections.Counter()
    for ids, mask in tokenizer.conversations(list(read_conversations(TEXT))):
        counts.update(token for token, answer in zip(ids, mask, strict=True) if answer)
    ends = tokenizer.eos_ids
    rest = sorted((x for x in range(8192) if x not in ends), key=lambda x: (-counts[x], x))
    expected = sorted([*ends, *rest[: 2048 - len(ends)]])
    share = sum(counts[x] for x in expected) / counts.total()
    assert f"draft vocabulary: 2048 tokens cover {share:.2%} of the answers" in out
    assert (found["format"], found["kinds"]) == ("hf", ["eagle"])
    assert (found["draft_vocab_size"], found["draft_vocab_coverage"]) == (2048, share)

    stored = tensors(tmp_path / "x")
    assert list(np.arange(2048) + stored.pop("d2t")) == expected
    assert_same(stored, tensors(shipped / "eagle"))
    own = {"draft_vocab_size": 2048, "draft_vocab_coverage": share}
    assert settings(tmp_path / "x").items() >= own.items()
    params = eagle_jax.load("tiny", draft=tmp_path / "x")
    head = params.drafts["eagle"].params["lm_head.kernel"]
    np.testing.assert_array_equal(head, params.target["lm_head.kernel"][:, np.array(expected)])
    assert head.shape == (512, 2048)

    _, found = said(capsys, "--inspect", tmp_path / "x", "--target", "tiny")
    assert found["."]["draft vocabulary"] == "2048 of 8192 tokens (25.0%)"
    assert found["."]["coverage of the training text"] == f"{share:.2%}"
    assert "cannot be loaded" not in found["."]


@pytest.fixture
def answers(tmp_path) -> Path:
    (tmp_path / "text").mkdir()
    return Path(tiny_run.write_conversations(tmp_path / "text" / "answers.jsonl", 20))


@pytest.fixture
def short(model, answers, tmp_path) -> Path:
    """An EAGLE-1 head with a draft vocabulary."""
    to = tmp_path / "short"
    options: dict[str, Any] = {"draft_vocabulary": 9, "text": [answers]}
    convert.convert(model / "eagle", to, "hf", target=model / "target", **options)
    return to


def test_a_draft_vocabulary_in_a_native_directory(model, short, answers, tmp_path):
    """Catches drafts of other kinds that get lost or changed, and a vocabulary that does."""
    options: dict[str, Any] = {"draft_vocabulary": 9, "text": [answers]}
    summary = convert.convert(model, tmp_path / "new", "native", **options)
    assert summary["kinds"] == ["target", *KINDS] and summary["draft_vocab_size"] == 9
    assert_same(tensors(tmp_path / "new" / "eagle"), tensors(short))
    assert settings(tmp_path / "new" / "eagle") == settings(short)
    for kind in ("eagle3", "medusa", "model"):
        assert_same(tensors(tmp_path / "new" / kind), tensors(model / kind))
    convert.convert(tmp_path / "new", tmp_path / "again", "native")
    assert_same(tensors(tmp_path / "again" / "eagle"), tensors(short))
    assert settings(tmp_path / "again" / "eagle") == settings(short)
    assert eagle_jax.load(tmp_path / "again").drafts["eagle"].config.kind == "eagle"


def test_a_draft_vocabulary_that_a_format_has_no_place_for(model, short, tmp_path):
    """Catches a table that other code takes for EAGLE-3's, and one that is left out silently."""
    for layout in ("official", "sglang"):
        where = {"target": model / "target"}
        convert.convert(model / "eagle", tmp_path / layout / "plain", layout, **where)
        with pytest.warns(UserWarning, match=f"format '{layout}' has no place for the draft") as x:
            convert.convert(short, tmp_path / layout / "short", layout, **where)
        assert "of 9 tokens: the head is written without it" in str(x[0].message)
        plain, left = tmp_path / layout / "plain", tmp_path / layout / "short"
        assert_same(tensors(left), tensors(plain))
        assert settings(left) == settings(plain)
    text = message(convert.convert, short, tmp_path / "new", "speculators")
    assert "kind 'eagle' has no layout in speculators" in text


def test_what_is_wrong_with_a_draft_vocabulary(model, short, answers, tmp_path):
    """Catches a traceback, and a vocabulary that somebody did not ask for."""

    def fails(source=model / "eagle", layout="hf", **changes) -> str:
        options: dict[str, Any] = {"draft_vocabulary": 9, "text": [answers]} | changes
        if source != model:
            options = {"target": model / "target"} | options
        text = message(convert.convert, source, tmp_path / "new", layout, **options)
        assert not (tmp_path / "new").exists()
        return text

    assert fails(text=[]).startswith("draft_vocabulary=9: its tokens are counted in a text; give")
    assert "answers.jsonl': is read for a draft vocabulary; give" in fails(draft_vocabulary=None)
    assert fails(draft_vocabulary=0) == "draft_vocabulary=0: must be at least 1"
    assert "261: the target has 260 tokens; use fewer" in fails(draft_vocabulary=261)
    assert "9: format 'sglang' has no place for it; use 'hf' or 'native'" in fails(layout="sglang")
    assert "of kind 'eagle', the source has medusa; give" in fails(model / "medusa")
    assert "for heads of kind 'eagle', not 'eagle3'; leave --kind" in fails(model, kind="eagle3")
    assert f"{short} has a draft vocabulary of 9 tokens; give the head that" in fails(short)
    assert f"{model / 'target'}: is a target without drafts" in fails(model / "target", target=None)
    assert "has no tokenizer to count with; give its target" in fails(target=None)
    assert "no such file; give a .jsonl" in fails(text=[tmp_path / "nothing.jsonl"])
    taken = message(
        convert.convert, model, short, "hf", draft_vocabulary=9, text=[tmp_path / "nothing.jsonl"]
    )
    assert f"{short}: exists and is not empty" in taken  # before the text is read
    silent = tmp_path / "silent.jsonl"
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": ""}]
    for lines in ("", json.dumps({"messages": turns})):
        silent.write_text(lines)
        assert f"text={silent}: has no words of an assistant; give conv" in fails(text=[silent])
    silent.write_text(json.dumps({"messages": turns[:1]}))
    assert f"{silent}:1: no assistant turn" in fails(text=[silent])
    edit(model / "target", eos_token_id=[256, 257])
    (model / "target" / "generation_config.json").write_text('{"eos_token_id": [256, 257]}')
    said = "draft_vocabulary=1: the tokens that end an answer alone are 2; make it larger"
    assert fails(draft_vocabulary=1) == said
    (model / "target" / "tokenizer.json").unlink()
    assert f"tokenizer='{model / 'target'}': not found" in fails()
