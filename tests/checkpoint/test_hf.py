"""Hugging Face directories: bit-exact round trips, transformers' reading, and errors that help."""

import dataclasses
import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from eagle_jax.checkpoint import hf, safetensors
from eagle_jax.config import EagleConfig, TransformerConfig

# Every size differs from every other, so that a wrong axis cannot pass.
TARGET = TransformerConfig(
    vocab_size=40,
    hidden_size=24,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rope_theta=50000.0,
    rms_norm_eps=1e-4,
    max_position_embeddings=96,
)
DRAFT = EagleConfig(
    vocab_size=40,
    hidden_size=24,
    intermediate_size=56,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rope_theta=50000.0,
    rms_norm_eps=1e-4,
)
TARGETS = [
    TARGET,
    dataclasses.replace(TARGET, tie_word_embeddings=True),
    dataclasses.replace(TARGET, attention_bias=True),
]
DRAFTS = [DRAFT, dataclasses.replace(DRAFT, bias=False, attention_bias=True)]


def random_params(config, dtype="float32"):
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in hf.shapes(config).items()}


def message(function, *args) -> str:
    with pytest.raises(ValueError) as info:
        function(*args)
    text = str(info.value)
    assert "\n" not in text
    return text


def edit(directory, **changes):
    path = directory / "config.json"
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in settings.items() if v != "absent"}))


def retensor(directory, change):
    path = directory / "model.safetensors"
    tensors = safetensors.read(path)
    change(tensors)
    safetensors.write(path, tensors)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes(), name


@pytest.fixture
def target(tmp_path):
    hf.save_target(tmp_path, TARGET, random_params(TARGET), "float32")
    return tmp_path


@pytest.fixture
def draft(tmp_path):
    hf.save_draft(tmp_path, DRAFT, random_params(DRAFT), "float32")
    return tmp_path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", TARGETS + DRAFTS)
def test_round_trip_is_bit_exact(tmp_path, config, dtype):
    draft = isinstance(config, EagleConfig)
    params = random_params(config, dtype)
    save, load = (hf.save_draft, hf.load_draft) if draft else (hf.save_target, hf.load_target)
    save(tmp_path / "new", config, params, dtype)
    found_config, found = load(tmp_path / "new")
    assert found_config == config
    assert_same(found, params)


def test_saves_jax_arrays_and_casts(tmp_path):
    params = random_params(DRAFT)
    hf.save_draft(tmp_path, DRAFT, {k: jnp.asarray(v) for k, v in params.items()}, "bfloat16")
    rounded = {name: value.astype(ml_dtypes.bfloat16) for name, value in params.items()}
    assert_same(hf.load_draft(tmp_path)[1], rounded)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", TARGETS)
def test_transformers_opens_a_target(tmp_path, config, dtype):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    params = random_params(config, dtype)
    hf.save_target(tmp_path, config, params, dtype, bos_token_id=1, eos_token_id=[2, 3])
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info.values()), info
    assert model.dtype == getattr(torch, dtype)
    assert (model.config.bos_token_id, model.config.eos_token_id) == (1, [2, 3])
    assert model.config.rope_parameters["rope_theta"] == config.rope_theta
    for name in ("head_dim", "rms_norm_eps", "max_position_embeddings", "num_key_value_heads"):
        assert getattr(model.config, name) == getattr(config, name)
    state = {name: value.float().numpy() for name, value in model.state_dict().items()}
    attention = params["layers.1.self_attn.k_proj.kernel"].astype(np.float32)
    np.testing.assert_array_equal(state["model.layers.1.self_attn.k_proj.weight"], attention.T)
    embedding = params["embed_tokens.embedding"].astype(np.float32)
    np.testing.assert_array_equal(state["model.embed_tokens.weight"], embedding)
    head = embedding if config.tie_word_embeddings else params["lm_head.kernel"].T
    np.testing.assert_array_equal(state["lm_head.weight"], head.astype(np.float32))
    loaded = {name for name in state if not (config.tie_word_embeddings and "lm_head" in name)}
    assert len(loaded) == len(params)


def test_reads_what_transformers_writes_in_shards(tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    hf.save_target(tmp_path / "ours", TARGET, random_params(TARGET), "float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs", max_shard_size="8KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    config, params = hf.load_target(tmp_path / "theirs")
    assert config == TARGET
    assert_same(params, random_params(TARGET))


def test_old_config_keys(target):
    edit(target, rope_parameters="absent", head_dim=None, num_key_value_heads="absent")
    edit(target, rope_theta=7, num_attention_heads=2, hidden_size=24)
    # Derived: two heads, each 12 wide, and as many for keys.
    text = message(hf.load_target, target)
    assert "q_proj.weight has shape (32, 24), the configuration implies (24, 24)" in text
    hf.save_draft(target, DRAFT, random_params(DRAFT), "float32")
    edit(target, bias="absent", qkv_bias="absent", rope_parameters="absent", rope_theta="absent")
    assert hf.load_draft(target)[0] == dataclasses.replace(DRAFT, rope_theta=10000.0)


def test_extra_tensors_that_are_known_are_ignored(draft):
    retensor(draft, lambda t: t.update({"embed_tokens.weight": np.zeros((40, 24))}))
    assert_same(hf.load_draft(draft)[1], random_params(DRAFT))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model_type": "gpt2"}, ["'gpt2'", "known: llama, qwen2"]),
        ({"attention_bias": True}, ["attention_bias=True", "only False"]),
        ({"hidden_act": "gelu"}, ["hidden_act='gelu'"]),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, ["'llama3'"]),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, ["'linear'"]),
        ({"hidden_size": "absent"}, ["has no hidden_size"]),
        ({"hidden_size": "24"}, ["hidden_size='24': must be int"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads=3"]),
        ({"intermediate_size": 64}, ["mlp.gate_proj.weight", "(56, 24)", "(64, 24)"]),
        ({"num_hidden_layers": 1}, ["unexpected", "model.layers.1.", "and 5 more"]),
        ({"num_hidden_layers": 3}, ["lacks", "model.layers.2."]),
    ],
)
def test_target_config_errors(target, changes, parts):
    edit(target, **changes)
    text = message(hf.load_target, target)
    assert all(part in text for part in [str(target), *parts]), text


def test_file_errors(target):
    (target / "model.safetensors").unlink()
    assert "no model.safetensors" in message(hf.load_target, target)
    (target / "config.json").write_text("{")
    assert "not valid JSON" in message(hf.load_target, target)
    (target / "config.json").unlink()
    assert "no such file" in message(hf.load_target, target)


def test_wrong_params_are_not_saved(tmp_path):
    params = random_params(DRAFT) | {"fc.kernel": np.zeros((24, 48))}
    text = message(hf.save_draft, tmp_path / "new", DRAFT, params)
    assert "fc.kernel has shape (24, 48), the configuration implies (48, 24)" in text
    assert "dtype='int8'" in message(hf.save_draft, tmp_path / "new", DRAFT, params, "int8")
    assert not (tmp_path / "new").exists()


def test_eagle3_drafts_are_named(draft):
    edit(draft, draft_vocab_size=20)
    assert "EAGLE-3" in message(hf.load_draft, draft)


def test_check_fit():
    hf.check_fit(TARGET, DRAFT)
    text = message(hf.check_fit, TARGET, dataclasses.replace(DRAFT, vocab_size=41))
    assert "vocab_size: the target has 40, the draft 41" in text
