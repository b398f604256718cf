"""Loading models: mistakes are told in one line; importing stays cheap."""

import copy
import dataclasses
import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_pair
from decoding import compilations
from flax import nnx

import eagle_jax
from eagle_jax.checkpoint import hf, manifest, safetensors
from eagle_jax.config import Eagle3Config, EagleConfig
from eagle_jax.decode import Eagle, Vanilla, generate
from eagle_jax.decode.program import Program
from eagle_jax.drafters import registry
from eagle_jax.layout import Layout
from eagle_jax.models import bind
from eagle_jax.models.kernels import device
from eagle_jax.models.weight_layout import fuse
from eagle_jax.sharding import make_mesh, replicated
from eagle_jax.testing import tiny_params, tiny_target

KINDS = ("eagle", "eagle3", "medusa", "model")

# Each costs seconds. optax is not among them: flax.nnx imports it.
HEAVY = ("grain", "matplotlib", "orbax", "tensorboardX", "tensorflow_datasets", "torch")
HEAVY += ("transformers",)


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def fails(said: str, *arguments, **options) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as info:
        eagle_jax.load(*arguments, **options)
    assert "\n" not in str(info.value)


def copied(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def other_eagle(model: Path, **changes) -> Path:
    """A second EAGLE-1 draft, of zeros."""
    config: Any = hf.load_draft(model / "eagle")[0]
    config = dataclasses.replace(config, **changes)
    zeros = {name: np.zeros(shape) for name, shape in hf.shapes(config).items()}
    hf.save_draft(model.parent / "other", config, zeros)
    return model.parent / "other"


def test_a_directory_gives_all_its_drafts(model) -> None:
    """Catches a kind that is not found, is filed under another, or lost a bit on the way."""
    params = eagle_jax.load(model)
    assert params.tokenizer is not None
    assert sorted(params.drafts) == list(KINDS)
    expected = tiny_params(tiny_target(params.target_config.vocab_size), 3)
    for kind, draft in params.drafts.items():
        assert draft.config.kind == kind
        given = {name: np.asarray(x) for name, x in expected.drafts[kind].params.items()}
        arrays = fuse(given, draft.config, draft.layout)
        assert draft.params.keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(draft.params[name], array, err_msg=name)


def test_every_draft_that_is_loaded_can_be_bound(model) -> None:
    """Catches a configuration in memory that does not describe the arrays beside it."""
    for kind, draft in eagle_jax.load(model).drafts.items():
        module = registry.by_kind(kind).module_class()
        module = bind(module, draft.config, draft.params, draft.layout)
        found = {".".join(map(str, path)): x for path, x in nnx.to_flat_state(nnx.state(module))}
        assert {name: x.shape for name, x in found.items()} == {
            name: x.shape for name, x in draft.params.items()
        }


@pytest.mark.parametrize(
    ("gpu", "dtype", "devices", "joined"),
    [
        (True, "bfloat16", 0, True),
        (True, "float16", 1, True),
        (True, "float32", 0, False),
        (True, "bfloat16", 2, True),
        (False, "bfloat16", 0, False),
    ],
    ids=["bfloat16", "a mesh of one", "float32", "two devices", "no GPU"],
)
def test_q_k_and_v_are_joined_for_our_kernels_only(
    model, monkeypatch, gpu: bool, dtype: str, devices: int, joined: bool
) -> None:
    """Catches the layout of GPUs on TPUs, where it is slower."""
    monkeypatch.setattr(device, "_gpu", lambda: gpu)
    places = [None]
    if devices:
        mesh = make_mesh(tensor=devices, devices=jax.devices()[:devices])
        places = [mesh, replicated(mesh)]
    plain = hf.load_target(model / "target")
    for place in places:
        params = eagle_jax.load(model, dtype=dtype, sharding=place)
        layout = Layout(gate_up_fused=True, qkv_fused=joined)
        assert params.layout == layout
        for kind, draft in params.drafts.items():
            own = kind != "medusa" and joined
            assert draft.layout == layout, kind
            assert any("qkv_proj" in name for name in draft.params) == own, kind
        wanted = fuse(plain[1], params.target_config, layout)
        assert ("layers.0.self_attn.qkv_proj.kernel" in wanted) == joined
        for name, array in wanted.items():
            got = params.target[name]
            np.testing.assert_array_equal(got, array.astype(got.dtype), err_msg=name)


def test_a_bare_target_has_no_drafts_but_takes_one(model) -> None:
    """Catches drafts taken from beside a target that was named itself."""
    assert not eagle_jax.load(model / "target").drafts
    params = eagle_jax.load(model / "target", draft=model / "medusa")
    assert list(params.drafts) == ["medusa"]
    params = eagle_jax.load(model / "target", draft=[model / "eagle3", str(model / "model")])
    assert sorted(params.drafts) == ["eagle3", "model"]


def test_a_given_draft_replaces_its_kind_only(model) -> None:
    """Catches a given draft that loses to the target's own, or drops the other kinds."""
    own = eagle_jax.load(model)
    params = eagle_jax.load(model, draft=other_eagle(model))
    assert sorted(params.drafts) == list(KINDS)
    assert not np.asarray(params.drafts["eagle"].params["fc.kernel"]).any()
    for kind in ("eagle3", "medusa", "model"):
        for name, array in own.drafts[kind].params.items():
            np.testing.assert_array_equal(params.drafts[kind].params[name], array)


def test_a_broken_draft_that_is_replaced(model) -> None:
    """Catches a pair that cannot be loaded for a draft which nobody wants."""
    manifest.write_manifest(model, {name: name for name in ("target", *KINDS)})
    other = other_eagle(model)
    (model / "eagle" / "model.safetensors").unlink()
    fails(f"{model / 'eagle' / 'model.safetensors'}: no such file, though", model)
    assert sorted(eagle_jax.load(model, draft=other).drafts) == list(KINDS)


def test_a_draft_is_no_target(model) -> None:
    """Catches a list of missing tensors where the arguments are the wrong way round."""
    for kind in ("eagle", "eagle3", "medusa"):
        said = f"{model / kind}: is a draft of kind {kind!r}; give its target, and this as draft="
        fails(said, model / kind)


def test_a_given_draft_adds_its_kind(model) -> None:
    """Catches `draft=` that only replaces."""
    away = copied(model / "medusa", model.parent / "heads")
    shutil.rmtree(model / "medusa")
    assert "medusa" not in eagle_jax.load(model).drafts
    assert sorted(eagle_jax.load(model, draft=away).drafts) == list(KINDS)


def test_two_drafts_of_one_kind(model) -> None:
    """Catches one of them silently winning, whether both are given or both are there."""
    other = other_eagle(model)
    said = f"{model / 'eagle'} and {other}: both hold a draft of kind 'eagle'; give one"
    fails(said, model, draft=[model / "eagle", other])
    again = copied(model / "eagle", model / "newer")
    fails(f"{model / 'eagle'} and {again}: both hold a draft of kind 'eagle'; give one", model)


def test_dtype_is_of_weights_not_of_tables(model) -> None:
    """Catches token offsets cast to bfloat16, which rounds 257 to 256."""
    params = eagle_jax.load(model, dtype="bfloat16")
    weights = dict(params.target)
    for kind, draft in params.drafts.items():
        weights |= {f"{kind}.{name}": array for name, array in draft.params.items()}
    assert str(weights.pop("eagle3.d2t").dtype) == "int32"
    assert {str(array.dtype) for array in weights.values()} == {"bfloat16"}


def test_params_go_through_jit(model) -> None:
    """Catches configurations that are traced, or arrays that are compared as static."""
    params = eagle_jax.load(model)
    traces = 0

    @jax.jit
    def tables(params):
        nonlocal traces
        traces += 1
        draft = params.drafts["eagle3"]
        assert draft.config.draft_vocab_size == len(draft.params["d2t"])
        return jax.tree.map(lambda x: x + jnp.ones((), x.dtype), params)

    once = tables(params)
    twice = tables(once)
    assert traces == 1
    assert (once.target_config, once.tokenizer) == (params.target_config, params.tokenizer)
    assert {kind: draft.config for kind, draft in twice.drafts.items()} == {
        kind: draft.config for kind, draft in params.drafts.items()
    }
    before, after = params.drafts["eagle3"].params["d2t"], twice.drafts["eagle3"].params["d2t"]
    np.testing.assert_array_equal(after, before + 2)


def test_with_draft_keeps_one_kind(model) -> None:
    """Catches drafts that stay in memory though nobody uses them."""
    params = eagle_jax.load(model)
    assert list(params.with_draft("medusa").drafts) == ["medusa"]
    assert params.with_draft("medusa").drafts["medusa"] is params.drafts["medusa"]
    assert not params.with_draft(None).drafts and not params.with_draft("nothing").drafts
    assert params.with_draft(None).target is params.target
    assert len(params.drafts) == len(KINDS)


def test_tokenizer_and_directory_do_not_affect_compilation(model) -> None:
    """Catches a program that is compiled again for the same model in another place."""
    params = eagle_jax.load(model)
    moved = dataclasses.replace(params, directory=Path("elsewhere"), tokenizer=None)
    options = {"method": "eagle", "max_new_tokens": 3, "ignore_eos": True}
    first = generate(params, [3, 1, 4], **options).tokens
    with compilations() as seen:
        assert generate(moved, [3, 1, 4], **options).tokens.tolist() == first.tolist()
    assert not seen
    program = Program.of(params, Eagle(), 64)
    weights = program.weights(params)
    assert weights.target is params.target and weights.draft is params.drafts["eagle"].params
    leaves, structure = jax.tree.flatten(weights)
    assert structure == jax.tree.structure(program.weights(moved))
    assert len(leaves) == len(params.target) + len(params.drafts["eagle"].params)
    assert not Program.of(params, Vanilla(), 64).weights(params).draft


def test_a_model_is_pickled_and_copied(model) -> None:
    """Catches a tokenizer whose chat template or switches are lost, and arrays of another dtype."""
    params = eagle_jax.load(model, dtype="bfloat16")
    assert params.tokenizer is not None
    turns = [{"role": "user", "content": "1 + 1"}]
    before = params.tokenizer.chat(turns)  # compiles the template
    for again in (pickle.loads(pickle.dumps(params)), copy.deepcopy(params)):
        assert repr(again) == repr(params) and again.directory == params.directory
        assert (again.layout, again.target_config) == (params.layout, params.target_config)
        assert again.tokenizer is not None and again.tokenizer == params.tokenizer
        assert again.tokenizer.chat(turns) == before
        assert again.tokenizer.encode("<|end|> a") == params.tokenizer.encode("<|end|> a")
        for name, array in params.target.items():
            assert again.target[name].dtype == array.dtype
            np.testing.assert_array_equal(again.target[name], array, err_msg=name)
        for kind, draft in params.drafts.items():
            other = again.drafts[kind]
            assert (other.config, other.layout) == (draft.config, draft.layout)
            jax.tree.map(np.testing.assert_array_equal, other.params, draft.params)


def test_a_short_repr(model) -> None:
    """Catches a screen full of numbers, and a size or a dtype that is another model's."""
    params = eagle_jax.load(model)
    count = sum(x.size for x in params.target.values()) / 1000
    start = f"Params(llama, {count:.1f}k weights in memory, float32, drafts: "
    assert repr(params).startswith(start) and repr(params).endswith(f"; from {params.directory})")
    assert all(f"{kind} " in repr(params) for kind in KINDS) and len(repr(params)) < 300
    assert "\n" not in repr(params)
    eight = eagle_jax.load(model, quantize="int8", quantize_drafts="int8").with_draft("medusa")
    assert "float32 int8, drafts: medusa " in repr(eight)
    assert "no drafts" in repr(params.with_draft(None))
    assert repr(eagle_jax.load("tiny")).endswith("; from tiny)")
    assert re.fullmatch(r"Draft\(medusa [\d.]+k int8\)", repr(eight.drafts["medusa"]))


def test_a_draft_vocabulary_without_the_end(model) -> None:
    """Catches a draft that can never propose the end of an answer."""
    config, arrays = hf.load_draft(model / "eagle3")
    assert isinstance(config, Eagle3Config)
    first = {**arrays, "d2t": np.zeros_like(arrays["d2t"])}  # the bytes; special tokens come last
    hf.save_draft(model / "eagle3", config, first, "float32")
    said = f"{model / 'eagle3'}: the draft vocabulary lacks token 256 (<|end|>), which ends answers"
    fails(f"{said}; give a draft whose vocabulary has it", model)
    (model / "target" / "tokenizer.json").unlink()
    assert "eagle3" in eagle_jax.load(model).drafts  # nobody knows what ends an answer


SHORT = (256, 3, 259, 40, 7, 128)  # the first ends an answer


def short_eagle(model: Path, tokens=SHORT, heads: int = 1) -> Path:
    """The EAGLE-1 draft with a draft vocabulary, and so many key heads."""
    config, arrays = hf.load_draft(model / "eagle")
    assert isinstance(config, EagleConfig)
    sizes = {"draft_vocab_size": len(tokens), "num_key_value_heads": heads}
    config = dataclasses.replace(config, **sizes)
    for name in ("k", "v"):
        name = f"layers.0.self_attn.{name}_proj.kernel"
        arrays[name] = np.tile(arrays[name], heads)
    table = np.array(tokens, np.int32) - np.arange(len(tokens), dtype=np.int32)
    hf.save_draft(model.parent / "short", config, {**arrays, "d2t": table}, "float32")
    return model.parent / "short"


def check_columns(params: eagle_jax.Params, head: np.ndarray, tokens) -> None:
    draft = params.drafts["eagle"]
    assert draft.params["d2t"].dtype == jnp.int32
    found = np.asarray(draft.params["lm_head.kernel"])
    assert found.dtype == head.dtype
    np.testing.assert_array_equal(found, head[:, list(tokens)])


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"quantize": "int8"}])
def test_a_draft_vocabulary_takes_the_targets_columns(model, options) -> None:
    """Catches columns of other tokens, columns rounded twice, and a head in eight bits."""
    whole = eagle_jax.load(model, **options | {"quantize": None})
    params = eagle_jax.load(model, draft=short_eagle(model), **options)
    check_columns(params, np.asarray(whole.target["lm_head.kernel"]), SHORT)


def test_a_draft_vocabulary_of_a_tied_head(tmp_path) -> None:
    """Catches columns of the embedding's other axis, and a target without a head."""
    model = tiny_pair.write(tmp_path / "model", tie_word_embeddings=True)
    params = eagle_jax.load(model, draft=short_eagle(model, (256, 3, 40)))
    check_columns(params, np.asarray(params.target["embed_tokens.embedding"]).T, (256, 3, 40))


def test_a_draft_vocabulary_of_shards_on_a_mesh(model) -> None:
    """Catches columns that are looked for in the first file only, or whole on every device."""
    file = model / "target" / "model.safetensors"
    tensors = safetensors.read(file)
    file.unlink()
    for i in (0, 1):
        part = dict(list(tensors.items())[i::2])
        safetensors.write(file.with_name(f"model-0000{i + 1}-of-00002.safetensors"), part)
    mesh = make_mesh(tensor=2, devices=jax.devices()[:2])
    params = eagle_jax.load(model, draft=short_eagle(model, heads=2), sharding=mesh)
    check_columns(params, tensors["lm_head.weight"].T, SHORT)
    head = params.drafts["eagle"].params["lm_head.kernel"]
    assert [shard.data.shape for shard in head.addressable_shards] == [(32, 3)] * 2
    table = params.drafts["eagle"].params["d2t"]
    assert table.sharding.is_fully_replicated


def test_the_targets_head_is_read_once(model, monkeypatch) -> None:
    """Catches a second whole head on the host, for a few of its columns."""
    names, load = [], safetensors._load

    def told(path, name):
        names.append(name)
        return load(path, name)

    short = short_eagle(model)
    monkeypatch.setattr(safetensors, "_load", told)
    eagle_jax.load(model / "target", draft=short)
    assert names.count("lm_head.weight") == 1 and "d2t" in names


def test_an_eagle_vocabulary_without_the_end(model) -> None:
    """Catches a draft that can never propose the end of an answer."""
    short = short_eagle(model, (3, 40, 7))
    said = f"{short}: the draft vocabulary lacks token 256 (<|end|>), which ends answers"
    fails(f"{said}; give a draft whose vocabulary has it", model, draft=short)


def test_official_layers_follow_from_the_target(model) -> None:
    """Catches a draft read without its target: heads of EAGLE-3's authors name no layers."""
    path = model / "eagle3" / "config.json"
    settings = json.loads(path.read_text())
    del settings["eagle_aux_hidden_state_layer_ids"]
    path.write_text(json.dumps(settings))
    said = f"{path}: has no eagle_aux_hidden_state_layer_ids, and of a target with 2 layers the"
    fails(f"{said} official code fuses (1,), where a head reads 3; add the key", model)


def test_an_unknown_name_lists_the_shipped_pairs() -> None:
    """Catches a traceback, or a message that leaves the user guessing names."""
    fails("model 'tinny': neither a directory nor a shipped pair (tiny); give a folder", "tinny")


@pytest.mark.parametrize("part", ["target", *KINDS])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_truncated_weights(model, part, share) -> None:
    """Catches the library's own error, which does not name the file."""
    file = model / part / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(share * len(data))])
    fails(f"{file}: truncated or corrupt (", model)


@pytest.mark.parametrize("part", ["target", *KINDS])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.safetensors", "{folder}: has no model.safetensors; export the model again"),
        ("config.json", "{folder}/config.json: no such file; give a Hugging Face model directory"),
    ],
)
def test_missing_files(model, part, name, said) -> None:
    """Catches a draft that lost a file and is passed over without a word."""
    (model / part / name).unlink()
    fails(said.format(folder=model / part), model)


def test_a_missing_draft(model) -> None:
    """Catches a misspelt `draft=` that is ignored."""
    gone = model / "nowhere"
    fails(f"draft={str(gone)!r}: no such directory; give one", model, draft=gone)


def test_weights_and_configuration_that_disagree(model) -> None:
    """Catches weights that are loaded in part."""
    edit(model / "target" / "config.json", num_hidden_layers=3)
    fails("lacks tensors model.layers.2.input_layernorm.weight, ", model)


@pytest.mark.parametrize(
    ("field", "target", "draft"), [("vocab_size", 260, 300), ("hidden_size", 32, 48)]
)
def test_a_draft_of_another_target(model, field, target, draft) -> None:
    """Both values stand in the message."""
    other = other_eagle(model, **{field: draft})
    said = f"{other}: {field}: the target has {target}, the draft {draft}; give a draft that was"
    fails(said, model, draft=other)


def test_another_embedding_is_told(model) -> None:
    """Catches a head of another target that has the same sizes."""
    path = model / "eagle" / "model.safetensors"
    tensors = safetensors.read(path)
    target = safetensors.read(model / "target" / "model.safetensors")
    embedding = target["model.embed_tokens.weight"]
    for factor in (1.001, 2.0):
        safetensors.write(path, tensors | {"embed_tokens.weight": embedding * np.float32(factor)})
        if factor < 1.01:  # up to rounding
            eagle_jax.load(model)
    with pytest.warns(UserWarning, match="eagle: its embed_tokens.weight is not the target's"):
        eagle_jax.load(model)


def test_imports_are_cheap() -> None:
    """Catches a heavy package imported at the top of a module that decoding needs."""
    program = (
        "import sys, eagle_jax; light = 'jax' not in sys.modules; import eagle_jax.decode; "
        f"print(light, [name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "True []\n", done.stderr
