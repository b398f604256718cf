"""What the official EAGLE code opens, and what it makes of it: files it needs, keys it reads.

Its loaders are quoted by what they do. Both versions take a target's embedding where its index
says that it is; version 1 opens `pytorch_model.bin` of a head, the main one that file first;
EAGLE-3's takes the embedding from the head's file where `config.json` has `target_hidden_size`.
"""

import dataclasses
import json
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tiny_pair
import torch
from model_directories import message
from safetensors import safe_open

from eagle_jax import convert
from eagle_jax.checkpoint import hf, torch_bin
from eagle_jax.config import TransformerConfig
from eagle_jax.drafters import registry
from eagle_jax.drafters.eagle3.checkpoint import Eagle3Files, official_layers
from eagle_jax.testing import tiny_eagle3, tiny_target


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_pair.write(tmp_path_factory.mktemp("model"))


def official(model: Path, kind: str, to: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        convert.convert(model, to, "official", kind=kind)
    return to


def test_defect_22_no_target_hidden_size_where_it_is_the_drafts(model, tmp_path):
    """Catches a key that makes the official loader keep a random embedding, silently."""
    head = official(model, "eagle3", tmp_path / "head")
    settings = json.loads((head / "config.json").read_text())
    assert "target_hidden_size" not in settings
    with safe_open(head / "model.safetensors", "np") as file:
        assert "embed_tokens.weight" not in file.keys()


def test_defect_22_a_narrow_head_brings_its_embedding(tmp_path):
    """Catches the key without the matrix that it announces."""
    target = tiny_target()
    widths = {"hidden_size": 16, "head_dim": 8, "target_hidden_size": target.hidden_size}
    config = tiny_eagle3(target, **widths)
    files = registry.by_config(config).checkpoint()
    rng = np.random.default_rng(0)
    params = {n: rng.normal(size=s).astype(np.float32) for n, s in files.shapes(config).items()}
    params["d2t"] = np.zeros(config.draft_vocab_size, np.int32)
    hf.save_draft(tmp_path / "source", config, params, "float32")
    convert.convert(tmp_path / "source", tmp_path / "head", "official")
    assert json.loads((tmp_path / "head/config.json").read_text())["target_hidden_size"] == 32
    with safe_open(tmp_path / "head" / "model.safetensors", "np") as file:
        assert file.get_slice("embed_tokens.weight").get_shape() == [target.vocab_size, 16]


def walked(layers: int) -> tuple[int, ...]:
    """The layers that the official code's loop keeps."""
    chosen = []
    for idx in range(layers):
        if idx == layers - 3 or idx == layers // 2 or idx == 2:
            chosen.append(idx)
    return tuple(chosen)


def test_defect_23_every_layer_once_and_in_order():
    """Catches (2, 3, 3) of six layers, and an order that the official code does not have."""
    for layers in range(1, 100):
        assert official_layers(tiny_target(num_hidden_layers=layers)) == walked(layers)
    assert official_layers(tiny_target(num_hidden_layers=6)) == (2, 3)
    assert official_layers(tiny_target(num_hidden_layers=3)) == (0, 1, 2)
    assert official_layers(tiny_target(num_hidden_layers=32)) == (2, 16, 29)


@pytest.mark.parametrize(
    ("layers", "aux", "said"),
    [
        (6, (2, 3, 4), ["layers (2, 3, 4) (it fuses (2, 3), and stops, since its heads read 3)"]),
        (3, (2, 1, 0), ["layers (2, 1, 0) (it fuses (0, 1, 2))"]),
        (3, (0, 1, 2), []),
        (7, (2, 3, 4), []),
    ],
)
def test_defect_23_the_warning_says_what_it_does(layers, aux, said):
    """Catches a warning that names layers which the official code does not fuse."""
    target: TransformerConfig = tiny_target(num_hidden_layers=layers)
    config = tiny_eagle3(target, num_attention_heads=2, head_dim=16, aux_layers=aux)
    files = registry.by_config(config).checkpoint()
    assert isinstance(files, Eagle3Files) and files.unsaid(config, target) == said


def test_defect_23_a_head_without_layers_for_a_shallow_target(model, tmp_path):
    """Catches a head that is read with layers which its authors' code cannot have fused."""
    config, params = hf.load_draft(model / "eagle3")
    hf.save_draft(tmp_path / "head", config, params, "float32")
    path = tmp_path / "head" / "config.json"
    settings = json.loads(path.read_text())
    del settings["eagle_aux_hidden_state_layer_ids"]
    path.write_text(json.dumps(settings))
    six = dataclasses.replace(hf.load_target(model / "target")[0], num_hidden_layers=6)
    text = message(hf.load_draft, tmp_path / "head", six)
    assert "of a target with 6 layers the official code fuses (2, 3), where a head reads 3" in text
    seven = dataclasses.replace(six, num_hidden_layers=7)
    assert hf.load_draft(tmp_path / "head", seven)[0].aux_layers == (2, 3, 4)


def test_defect_24_the_index_beside_a_target(model, tmp_path):
    """Catches a target in which the official code does not find the embedding."""
    convert.convert(model, tmp_path / "hf", "hf")
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    name = index["weight_map"]["model.embed_tokens.weight"]
    with safe_open(tmp_path / "hf" / name, "np") as file:
        found = file.get_tensor("model.embed_tokens.weight")
        assert sorted(index["weight_map"]) == sorted(file.keys())
    config, params = hf.load_target(tmp_path / "hf")
    np.testing.assert_array_equal(found, params["embed_tokens.embedding"])
    assert config == hf.load_target(model / "target")[0]
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in params.values())


def test_defect_24_torchs_file_of_an_eagle_1_head(model, tmp_path):
    """Catches a head that version 1 of the official code does not open."""
    head = official(model, "eagle", tmp_path / "head")
    found = torch.load(head / "pytorch_model.bin", weights_only=True)
    with safe_open(head / "model.safetensors", "np") as file:
        assert set(found) == set(file.keys()) and "embed_tokens.weight" in found
        for name, tensor in found.items():
            np.testing.assert_array_equal(tensor.numpy(), file.get_tensor(name))
    (head / "model.safetensors").unlink()
    again, _ = hf.load_draft(head)
    assert again == hf.load_draft(model / "eagle")[0]
    for kind in ("eagle3", "medusa"):  # whose loaders open safetensors
        assert not list(official(model, kind, tmp_path / kind).glob("*.bin"))


def test_torch_reads_what_is_written(tmp_path):
    """Catches a pickle that torch takes for another tensor, of any dtype and shape."""
    rng = np.random.default_rng(0)
    arrays = {
        "matrix": rng.normal(size=(3, 5)).astype(np.float32),
        "half": rng.normal(size=(300,)).astype(np.float16),
        "brain": rng.normal(size=(2, 1, 2)).astype(ml_dtypes.bfloat16),
        "scalar": np.float32(7.5).reshape(()),
        "none": np.zeros((0, 4), np.float32),
        "table": np.arange(-3, 40),
        "mask": rng.integers(0, 2, 9).astype(bool),
    }
    seen = []
    torch_bin.write(tmp_path / "a.bin", arrays, seen.append)
    assert sum(seen) == sum(x.nbytes for x in arrays.values())
    found = torch.load(tmp_path / "a.bin", weights_only=True)
    own = torch_bin.stored(tmp_path / "a.bin")
    assert list(found) == list(own) == list(arrays)
    for name, array in arrays.items():
        tensor = found[name].float() if name == "brain" else found[name]
        assert tensor.shape == array.shape and not found[name].requires_grad
        np.testing.assert_array_equal(tensor.numpy(), array.astype(tensor.numpy().dtype))
        assert own[name].dtype == array.dtype
        np.testing.assert_array_equal(np.asarray(own[name]), array)
    (tmp_path / "again").mkdir()
    torch_bin.write(tmp_path / "again" / "a.bin", arrays)
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "again" / "a.bin").read_bytes()
    with pytest.raises(ValueError, match="odd has dtype uint32, which no torch storage has"):
        torch_bin.write(tmp_path / "c.bin", {"odd": np.zeros(2, np.uint32)})
    assert not (tmp_path / "c.bin").exists()
