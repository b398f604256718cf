"""Targets in Hugging Face directories: bit-exact, as transformers reads them, errors that help."""

import dataclasses
import json

import numpy as np
import pytest
from model_directories import assert_same, edit, message, random_params

from eagle_jax.checkpoint import hf
from eagle_jax.config import TransformerConfig

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
TARGETS = [
    TARGET,
    dataclasses.replace(TARGET, tie_word_embeddings=True),
    dataclasses.replace(TARGET, attention_bias=True),
]


@pytest.fixture
def target(tmp_path):
    hf.save_target(tmp_path, TARGET, random_params(TARGET), "float32")
    return tmp_path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("config", TARGETS)
def test_round_trip_is_bit_exact(tmp_path, config, dtype):
    """Catches a lost, transposed or rounded array, and a setting that is not written."""
    params = random_params(config, dtype)
    hf.save_target(tmp_path / "new", config, params, dtype)
    found_config, found = hf.load_target(tmp_path / "new")
    assert found_config == config
    assert_same(found, params)


def test_a_layout_in_memory_is_not_written(target):
    """Catches `fused_mlp` in a file, whose reader has the two matrices apart."""
    hf.save_target(target, dataclasses.replace(TARGET, fused_mlp=True), random_params(TARGET))
    assert "fused_mlp" not in json.loads((target / "config.json").read_text())
    edit(target, fused_mlp=True)
    assert hf.load_target(target)[0] == TARGET


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", TARGETS)
def test_transformers_opens_a_target(tmp_path, config, dtype):
    """Catches names, transposes and settings that only we understand."""
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
    """Catches a reader that takes the first file for the whole model."""
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
    """Catches other defaults than transformers' for keys that older files leave out."""
    edit(target, rope_parameters="absent", head_dim=None, num_key_value_heads="absent")
    edit(target, rope_theta=7, num_attention_heads=2, hidden_size=24)
    # Derived: two heads, each 12 wide, and as many for keys.
    text = message(hf.load_target, target)
    assert "q_proj.weight has shape (32, 24), the configuration implies (24, 24)" in text


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (
            {"model_type": "gpt2"},
            ["'gpt2'", "known: llama, mistral, qwen2, qwen3, mixtral, qwen3_moe, gemma2, gemma3"],
        ),
        ({"attention_bias": True}, ["attention_bias=True", "only False"]),
        ({"hidden_act": "gelu"}, ["hidden_act='gelu'"]),
        ({"rope_parameters": {"rope_type": "llama3"}}, ["no factor", "'llama3'"]),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1}},
            ["no high_freq_factor"],
        ),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, ["no factor", "'linear'"]),
        ({"rope_parameters": {"rope_type": "linear", "factor": "2"}}, ["factor='2'", "float"]),
        ({"rope_parameters": {"rope_type": "longrope"}}, ["'longrope'", "'llama3', 'yarn'"]),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, ["only 1"]),
        ({"rope_parameters": [1]}, ["rope_parameters=[1]"]),
        ({"model_type": "qwen3"}, ["lacks", "k_norm.weight"]),
        ({"model_type": "qwen2", "attention_bias": True}, ["lacks", "k_proj.bias"]),
        ({"model_type": "mistral", "sliding_window": 0}, ["sliding_window=0"]),
        (
            {"model_type": "gemma2", "hidden_act": "absent"},
            ["lacks", "layers.0.pre_feedforward_layernorm.weight"],
        ),
        (
            {"model_type": "gemma3_text", "hidden_act": "absent", "attn_logit_softcapping": 5.0},
            ["attn_logit_softcapping=5.0", "only None"],
        ),
        (
            {"model_type": "qwen3", "use_sliding_window": True, "layer_types": ["other", "other"]},
            ["layer_types", "'other'"],
        ),
        ({"model_type": "qwen3_moe", "num_experts_per_tok": 200}, ["num_experts_per_tok=200"]),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 0}, ["decoder_sparse_step=0"]),
        ({"model_type": "mixtral"}, ["lacks", "block_sparse_moe.experts.0.w1.weight"]),
        ({"hidden_size": "absent"}, ["has no hidden_size"]),
        ({"hidden_size": "24"}, ["hidden_size='24': must be int"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads=3"]),
        ({"intermediate_size": 64}, ["mlp.gate_proj.weight", "(56, 24)", "(64, 24)"]),
        ({"num_hidden_layers": 1}, ["unexpected", "model.layers.1.", "and 5 more"]),
        ({"num_hidden_layers": 3}, ["lacks", "model.layers.2."]),
    ],
)
def test_target_config_errors(target, changes, parts):
    """Catches settings that would be computed differently than they say."""
    edit(target, **changes)
    text = message(hf.load_target, target)
    assert all(part in text for part in [str(target), *parts]), text


def test_file_errors(target):
    """Catches a traceback in place of one line that names the file."""
    (target / "model.safetensors").unlink()
    assert "no model.safetensors" in message(hf.load_target, target)
    (target / "config.json").write_text("{")
    assert "not valid JSON" in message(hf.load_target, target)
    (target / "config.json").unlink()
    assert "no such file" in message(hf.load_target, target)


def test_wrong_params_are_not_saved(tmp_path):
    """Catches a directory that is half a model."""
    params = random_params(TARGET) | {"lm_head.kernel": np.zeros((40, 24))}
    text = message(hf.save_target, tmp_path / "new", TARGET, params)
    assert "lm_head.kernel has shape (40, 24), the configuration implies (24, 40)" in text
    assert "dtype='int8'" in message(hf.save_target, tmp_path / "new", TARGET, params, "int8")
    assert not (tmp_path / "new").exists()
