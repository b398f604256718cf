"""Targets in Hugging Face directories: bit-exact, as transformers reads them, errors that help."""

import dataclasses
import json

import numpy as np
import pytest
from model_directories import assert_same, edit, message, random_params, retensor

from eagle_jax.checkpoint import hf, safetensors
from eagle_jax.config import TransformerConfig
from eagle_jax.layout import Layout
from eagle_jax.models.weight_layout import fuse

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


GEMMA3 = {"model_type": "gemma3_text", "hidden_act": "absent", "layer_types": "absent"}


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
    """Catches arrays of a fused layout in a file, whose reader has all matrices apart, and a file
    whose words are taken for a layout."""
    layout = Layout(gate_up_fused=True, qkv_fused=True)
    fused = fuse(random_params(TARGET), TARGET, layout)
    assert "params: lacks tensors layers.0.mlp" in message(
        hf.save_target, target / "new", TARGET, fused
    )
    hf.save_target(target, TARGET, random_params(TARGET))
    words = {"fused": True, "quantize": "int8", **dataclasses.asdict(layout)}
    assert not words.keys() & json.loads((target / "config.json").read_text()).keys()
    edit(target, **words)
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
    assert "k_proj.weight has shape (16, 24), the configuration implies (24, 24)" in text


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
        (
            {"rope_parameters": {"rope_type": "linear", "factor": "2"}},
            ["factor='2'", "must be a finite number"],
        ),
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
        ({"rope_parameters": "absent", "rope_theta": [1]}, ["rope_theta=[1]: must be a positive"]),
        ({"rope_parameters": "absent", "rope_theta": {}}, ["rope_theta={}: must be a positive"]),
        ({"rope_parameters": {"rope_theta": 0}}, ["rope_theta=0: must be a positive number"]),
        ({"rope_parameters": {"rope_theta": -5.0}}, ["rope_theta=-5.0: must be a positive"]),
        ({"rope_parameters": {"full_attention": "x"}}, ["rope_parameters.full_attention='x'"]),
        ({"rms_norm_eps": -1.0}, ["rms_norm_eps=-1.0: must be 0 or more"]),
        ({"model_type": ["llama"]}, ["model_type=['llama'] is not supported; known: llama"]),
        ({"model_type": {}}, ["model_type={} is not supported"]),
        ({"num_hidden_layers": 10**7}, ["num_hidden_layers=10000000: the files have 21 tensors"]),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": "a"},
            ["max_window_layers='a': must be a number of layers"],
        ),
        (
            GEMMA3 | {"sliding_window_pattern": 0},
            ["sliding_window_pattern=0: must be at least 1"],
        ),
        (
            GEMMA3 | {"sliding_window_pattern": "6"},
            ["sliding_window_pattern='6': must be a number of layers"],
        ),
        (
            {"model_type": "qwen3_moe", "num_hidden_layers": "4"},
            ["num_hidden_layers='4': must be a number of layers"],
        ),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            ["quantization_config='gptq': quantised weights are not read"],
        ),
        ({"hidden_size": "absent"}, ["has no hidden_size"]),
        ({"hidden_size": "24"}, ["hidden_size='24': must be int"]),
        ({"hidden_size": "24", "head_dim": "absent"}, ["hidden_size='24': must be a whole"]),
        ({"num_attention_heads": 0, "head_dim": "absent"}, ["num_attention_heads=0: must be a"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads=3"]),
        ({"intermediate_size": 64}, ["mlp.down_proj.weight", "(24, 56)", "(24, 64)"]),
        ({"num_hidden_layers": 1}, ["unexpected", "model.layers.1.", "and 5 more"]),
        ({"num_hidden_layers": 3}, ["lacks", "model.layers.2."]),
    ],
)
def test_target_config_errors(target, changes, parts):
    """Catches settings that would be computed differently than they say."""
    edit(target, **changes)
    text = message(hf.load_target, target)
    assert all(part in text for part in [str(target), *parts]), text


@pytest.mark.parametrize("rope", [{"rope_theta": None}, {"full_attention": {"rope_theta": None}}])
def test_a_null_within_is_as_good_as_absent(target, rope):
    """Catches a traceback for keys that a writer left null."""
    edit(target, rope_parameters=rope, rope_theta=7.0)
    assert hf.load_target(target)[0] == dataclasses.replace(TARGET, rope_theta=7.0)


def test_integers_are_no_weights(target):
    """Catches quantised numbers that are taken for the weights themselves."""
    retensor(target, lambda x: x.update({"model.norm.weight": np.ones(24, np.int8)}))
    assert "model.norm.weight is int8, a quantised weight; give" in message(hf.load_target, target)


@pytest.mark.parametrize("written", ["safetensors", "bin"])
def test_a_tied_head_that_differs_is_none(tmp_path, written):
    """Catches a trained head that is passed over because the configuration says tied."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    params = random_params(TARGET)
    hf.save_target(tmp_path, TARGET, params, "float32")
    edit(tmp_path, tie_word_embeddings=True)
    ties = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight
    np.testing.assert_array_equal(ties.detach().numpy(), params["lm_head.kernel"].T)
    if written == "bin":
        tensors = safetensors.read(tmp_path / "model.safetensors")
        (tmp_path / "model.safetensors").unlink()
        tensors = {name: torch.tensor(x) for name, x in tensors.items()}
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    config, found = hf.load_target(tmp_path)
    assert config == TARGET
    assert_same(found, params)
    same = {"lm_head.kernel": params["embed_tokens.embedding"].T.copy()}
    hf.save_target(tmp_path, TARGET, params | same, "float32")
    edit(tmp_path, tie_word_embeddings=True)
    assert hf.load_target(tmp_path)[0] == dataclasses.replace(TARGET, tie_word_embeddings=True)


@pytest.mark.parametrize("code", ["F8_E4M3", "F8_E5M2"])
def test_eight_bits_are_told(target, code):
    """Catches a list of dtypes as the only word on a quantised model."""
    torch = pytest.importorskip("torch")
    import safetensors.torch as theirs

    dtype = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}[code]
    tensors = theirs.load_file(target / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)
    theirs.save_file(tensors, target / "model.safetensors")
    text = message(hf.load_target, target)
    assert f"model.norm.weight has dtype {code}, as quantised weights have" in text
    (target / "model.safetensors").unlink()
    torch.save(tensors, target / "pytorch_model.bin")
    assert "has tensors of a quantised dtype (float8 or" in message(hf.load_target, target)


@pytest.mark.parametrize("index", [{"a": []}, {"a": 5, "b": "x"}])
def test_a_wrong_index(target, index):
    """Catches a traceback where names of files are expected."""
    path = target / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": index}))
    assert f"{path}: names a shard" in message(hf.load_target, target)


def test_file_errors(target):
    """Catches a traceback in place of one line that names the file."""
    (target / "model.safetensors").unlink()
    assert "no model.safetensors" in message(hf.load_target, target)
    (target / "config.json").write_text('{"a":' * 3000)
    assert "not valid JSON" in message(hf.load_target, target)
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
