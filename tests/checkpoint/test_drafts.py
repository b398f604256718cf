"""Drafts in the layouts of published heads: round trips, others' variants, errors that help."""

import dataclasses
import json
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from model_directories import assert_same, edit, message, random_params, retensor

from eagle_jax.checkpoint import hf, safetensors
from eagle_jax.config import (
    Eagle3Config,
    EagleConfig,
    MedusaConfig,
    RopeScaling,
    TransformerConfig,
)
from eagle_jax.drafters import registry
from eagle_jax.models import init_params

# Every size differs from every other, so that a wrong axis cannot pass.
SIZES: dict[str, Any] = {"vocab_size": 40, "hidden_size": 24, "intermediate_size": 56}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
OWN: dict[str, Any] = {"rope_theta": 50000.0, "rms_norm_eps": 1e-4}
TARGET = TransformerConfig(**SIZES, num_hidden_layers=9)
EAGLE = EagleConfig(**SIZES, **OWN)
SHORT = EagleConfig(**SIZES, **OWN, draft_vocab_size=15)
EAGLE3 = Eagle3Config(**SIZES, **OWN, draft_vocab_size=15, aux_layers=(1, 4, 9))
MEDUSA = MedusaConfig(vocab_size=40, hidden_size=24, num_heads=3, num_layers=2)
MODEL = TransformerConfig(**SIZES | {"hidden_size": 20}, **OWN, num_hidden_layers=1)

CONFIGS = {
    "eagle": EAGLE,
    "eagle-biases": dataclasses.replace(EAGLE, bias=False, attention_bias=True),
    "eagle3": EAGLE3,
    "eagle3-biases": dataclasses.replace(EAGLE3, attention_bias=True),
    "eagle3-fc_norm": dataclasses.replace(EAGLE3, fc_norm=True, norm_output=True),
    "eagle3-norm_output": dataclasses.replace(EAGLE3, norm_output=True),
    "eagle3-two-layers": dataclasses.replace(EAGLE3, aux_layers=(0, 3), fc_norm=True),
    "eagle3-narrow": dataclasses.replace(EAGLE3, target_hidden_size=28, fc_norm=True),
    "eagle3-yarn": dataclasses.replace(EAGLE3, rope_scaling=RopeScaling("yarn", 4.0, 96)),
    "eagle-vocabulary": SHORT,
    "eagle-linear": dataclasses.replace(EAGLE, rope_scaling=RopeScaling("linear", 2.0)),
    "eagle3-whole-vocabulary": dataclasses.replace(EAGLE3, draft_vocab_size=40),
    "medusa": MEDUSA,
    "medusa-one-block": dataclasses.replace(MEDUSA, num_layers=1),
    "medusa-tied": dataclasses.replace(MEDUSA, tie_lm_head=True),
    "model": MODEL,
    "model-tied": dataclasses.replace(MODEL, tie_word_embeddings=True),
    "model-biases": dataclasses.replace(MODEL, attention_bias=True),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def written(directory, config):
    params = random_params(config)
    hf.save_draft(directory, config, params, "float32")
    return params


@each_config
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_is_bit_exact(tmp_path, config, dtype):
    """Catches a lost or rounded array, offsets cast with the weights, a kind taken for another."""
    params = random_params(config, dtype)
    hf.save_draft(tmp_path / "new", config, params, dtype)
    found_config, found = hf.load_draft(tmp_path / "new")
    assert found_config == config
    assert_same(found, params)


@each_config
def test_shapes_are_those_of_the_module(config):
    """Catches a parameter that the module has and no file would, or the reverse."""
    initial = {
        name: x.shape
        for name, x in init_params(registry.by_kind(config.kind).module_class(), config, 0).items()
    }
    if getattr(config, "draft_vocab_size", None):
        initial["d2t"] = (config.draft_vocab_size,)
    if config is SHORT:  # the target has it
        assert initial.pop("lm_head.kernel") == (24, 15)
    assert hf.shapes(config) == initial


def test_saves_jax_arrays_and_casts(tmp_path):
    """Catches files of another dtype than asked for, and tables that are cast as well."""
    params = random_params(EAGLE3)
    hf.save_draft(tmp_path, EAGLE3, {k: jnp.asarray(v) for k, v in params.items()}, "bfloat16")
    rounded = {name: value.astype(ml_dtypes.bfloat16) for name, value in params.items()}
    assert_same(hf.load_draft(tmp_path)[1], rounded | {"d2t": params["d2t"]})


def test_eagle3_has_the_official_layout(tmp_path):
    """Catches a name, a transpose or a table that other readers would not understand."""
    config = CONFIGS["eagle3-fc_norm"]
    params = random_params(config)
    hf.save_draft(tmp_path, config, params, "float32", coverage=0.75)
    tensors = safetensors.read(tmp_path / "model.safetensors")
    attention = {f"midlayer.self_attn.{name}_proj.weight" for name in "qkvo"}
    mlp = {f"midlayer.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    norms = ("hidden_norm", "input_layernorm", "post_attention_layernorm")
    top = {"fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d"}
    norms = {f"midlayer.{name}.weight" for name in norms}
    norms |= {f"fc_norm.{index}.weight" for index in range(3)}
    assert tensors.keys() == attention | mlp | norms | top
    assert tensors["fc.weight"].shape == (24, 72)
    # [embedding ; state] are twice the width.
    assert tensors["midlayer.self_attn.k_proj.weight"].shape == (16, 48)
    np.testing.assert_array_equal(tensors["lm_head.weight"], params["lm_head.kernel"].T)
    assert tensors["d2t"].dtype == np.int64 and tensors["t2d"].dtype == bool
    tokens = np.arange(15) + tensors["d2t"]
    assert np.array_equal(np.flatnonzero(tensors["t2d"]), tokens) and len(tensors["t2d"]) == 40

    settings = json.loads((tmp_path / "config.json").read_text())
    expected = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": 15,
        "vocab_size": 40,
        "eagle_aux_hidden_state_layer_ids": [1, 4, 9],
        "fc_norm": True,
        "norm_output": True,
        "draft_vocab_coverage": 0.75,
        "rope_theta": 50000.0,
    }
    assert {key: settings.get(key) for key in expected} == expected
    assert not {"gate_up_fused", "qkv_fused", "quantize"} & settings.keys()


def test_eagles_vocabulary_is_a_table_alone(tmp_path):
    """Catches columns of the target's head in a file: they would be a second copy, of any age."""
    plain = random_params(EAGLE)
    hf.save_draft(tmp_path / "plain", EAGLE, plain, "float32")
    params = plain | {"d2t": random_params(SHORT)["d2t"]}
    hf.save_draft(tmp_path / "short", SHORT, params, "float32", coverage=0.75)
    before, after = (safetensors.read(tmp_path / x / "model.safetensors") for x in SAVED)
    table = after.pop("d2t")
    assert table.dtype == np.int64 and table.tolist() == params["d2t"].tolist()
    assert_same(after, before)
    before, after = (json.loads((tmp_path / x / "config.json").read_text()) for x in SAVED)
    assert after == before | {"draft_vocab_size": 15, "draft_vocab_coverage": 0.75}


SAVED = ("plain", "short")


def test_medusa_has_the_published_layout(tmp_path):
    """Catches heads that other readers would not understand."""
    params = written(tmp_path, MEDUSA)
    tensors = safetensors.read(tmp_path / "model.safetensors")
    blocks = {f"{i}.{j}.linear.{x}" for i in range(3) for j in range(2) for x in ("weight", "bias")}
    assert tensors.keys() == blocks | {f"{i}.2.weight" for i in range(3)}
    kernel = params["heads.1.blocks.1.linear.kernel"]
    np.testing.assert_array_equal(tensors["1.1.linear.weight"], kernel.T)
    np.testing.assert_array_equal(tensors["2.2.weight"], params["heads.2.lm_head.kernel"].T)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert (settings["medusa_num_heads"], settings["medusa_num_layers"]) == (3, 2)


def rename(pattern, replacement):
    def change(tensors):
        for name in [name for name in tensors if name.startswith(pattern)]:
            tensors[replacement + name.removeprefix(pattern)] = tensors.pop(name)

    return change


def drop(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


def put(**arrays):
    return lambda tensors: tensors.update(arrays)


def embedding(tensors):
    tensors["embed_tokens.weight"] = np.zeros((40, 24))


@pytest.mark.parametrize(
    ("config", "change"),
    [
        (EAGLE, embedding),
        (EAGLE3, embedding),
        (EAGLE3, rename("midlayer.", "layers.0.")),
        (EAGLE3, rename("", "model.")),
        (EAGLE3, drop("t2d")),
        (EAGLE3, put(**{"midlayer.self_attn.rotary_emb.inv_freq": np.zeros(4)})),
        (MEDUSA, rename("", "medusa_head.")),
        (CONFIGS["medusa-tied"], rename("", "medusa_head.")),
    ],
)
def test_tensors_of_other_writers(tmp_path, config, change):
    """Catches heads that are refused for a name, or arrays that end up under another."""
    params = written(tmp_path, config)
    retensor(tmp_path, change)
    found_config, found = hf.load_draft(tmp_path)
    assert found_config == config
    assert_same(found, params)


def test_flags_that_the_tensors_tell(tmp_path):
    """Catches norms or heads that are dropped because no key announces them."""
    for name in ("eagle3-fc_norm", "medusa-tied", "medusa"):
        params = written(tmp_path / name, CONFIGS[name])
        edit(tmp_path / name, fc_norm="absent", tie_lm_head="absent")
        config, found = hf.load_draft(tmp_path / name)
        assert config == CONFIGS[name]
        assert_same(found, params)


def test_a_bias_that_no_key_tells(tmp_path):
    """Catches heads without a bias on fc that are refused because their file is silent."""
    for name, config in (("with", EAGLE), ("without", CONFIGS["eagle-biases"])):
        params = written(tmp_path / name, config)
        edit(tmp_path / name, bias="absent")
        found_config, found = hf.load_draft(tmp_path / name)
        assert found_config == config
        assert_same(found, params)


def test_a_whole_vocabulary_without_a_word(tmp_path):
    """Catches an EAGLE-3 head that is taken for EAGLE-1."""
    config = CONFIGS["eagle3-whole-vocabulary"]
    written(tmp_path, config)
    retensor(tmp_path, drop("d2t", "t2d"))
    retensor(tmp_path, rename("midlayer.", "layers.0."))
    edit(tmp_path, draft_vocab_size="absent")
    assert hf.load_draft(tmp_path)[0] == config


def test_a_whole_vocabulary_needs_no_table(tmp_path):
    """Catches heads like Vicuna's, whose offsets are all zero and may be missing."""
    config = CONFIGS["eagle3-whole-vocabulary"]
    params = written(tmp_path, config)
    retensor(tmp_path, drop("d2t", "t2d"))
    found_config, found = hf.load_draft(tmp_path)
    assert found_config == config
    assert_same(found, params | {"d2t": np.zeros(40, np.int32)})


def test_an_eagle_head_that_says_its_vocabulary_is_whole(tmp_path):
    """Catches a copy of the target's head for a draft that has all of its tokens."""
    params = written(tmp_path, EAGLE)
    edit(tmp_path, draft_vocab_size=40)
    found_config, found = hf.load_draft(tmp_path)
    assert found_config == EAGLE
    assert_same(found, params)


def test_published_medusa_heads_name_no_sizes(tmp_path):
    """Catches keys demanded that published heads don't have, and their file's own name."""
    config = CONFIGS["medusa-one-block"]
    params = written(tmp_path, config)
    settings = {"medusa_num_heads": 3, "base_model_name_or_path": "a/target"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "model.safetensors").rename(tmp_path / "medusa_lm_head.safetensors")
    found_config, found = hf.load_draft(tmp_path)
    assert found_config == config
    assert_same(found, params)


def test_tied_medusa_heads_take_the_targets_vocabulary(tmp_path):
    """Catches a size that is nowhere in the directory and is asked for all the same."""
    written(tmp_path, CONFIGS["medusa-tied"])
    edit(tmp_path, vocab_size="absent")
    assert hf.load_draft(tmp_path, TARGET)[0] == CONFIGS["medusa-tied"]
    assert "config.json: has no vocab_size; add it" in message(hf.load_draft, tmp_path)


def test_layers_that_no_key_names_are_the_official_ones(tmp_path):
    """Catches layers guessed without the target, or others than 2, L // 2, L - 3."""
    written(tmp_path, EAGLE3)
    edit(tmp_path, eagle_aux_hidden_state_layer_ids="absent")
    config, _ = hf.load_draft(tmp_path, TARGET)
    assert config == dataclasses.replace(EAGLE3, aux_layers=(2, 4, 6))
    text = message(hf.load_draft, tmp_path)
    assert "has no eagle_aux_hidden_state_layer_ids" in text and "with its target" in text


def test_layers_in_eagle_config_are_those_left(tmp_path):
    """Catches features that are off by one layer: acceptance falls and nothing else tells."""
    written(tmp_path, EAGLE3)
    nested = {"eagle_aux_hidden_state_layer_ids": [0, 3, 8], "use_aux_hidden_state": True}
    edit(tmp_path, eagle_aux_hidden_state_layer_ids="absent", eagle_config=nested)
    assert hf.load_draft(tmp_path, TARGET)[0] == EAGLE3
    edit(tmp_path, eagle_aux_hidden_state_layer_ids=[1, 4, 9])
    assert hf.load_draft(tmp_path)[0] == EAGLE3


@pytest.mark.parametrize("config", [EAGLE, EAGLE3])
def test_theta_is_the_drafts_own(tmp_path, config):
    """Catches the target's theta: heads were trained with 10000 unless their file says other."""
    written(tmp_path, config)
    edit(tmp_path, rope_parameters="absent", rope_theta="absent", qkv_bias="absent")
    target = dataclasses.replace(TARGET, rope_theta=5e5)
    assert hf.load_draft(tmp_path, target)[0] == dataclasses.replace(config, rope_theta=10000.0)


@pytest.mark.parametrize(
    ("config", "changes", "parts"),
    [
        (EAGLE, {"model_type": "gpt2"}, ["'gpt2'", "known: llama, mistral"]),
        (EAGLE, {"hidden_size": "absent"}, ["has no hidden_size; add it"]),
        (EAGLE, {"bias": False}, ["unexpected tensors fc.bias"]),
        (EAGLE, {"draft_vocab_size": 20}, ["has no d2t, though draft_vocab_size=20 is less"]),
        (SHORT, {"draft_vocab_size": 0}, ["draft_vocab_size=0: must be 1 to vocab_size=40"]),
        (SHORT, {"draft_vocab_size": 41}, ["draft_vocab_size=41: must be 1 to vocab_size=40"]),
        (SHORT, {"draft_vocab_size": 16}, ["d2t is int64 of shape (15,), not integers of shape"]),
        (SHORT, {"draft_vocab_size": "absent"}, ["has unexpected tensors d2t"]),
        (SHORT, {"draft_vocab_size": "15"}, ["draft_vocab_size='15': must be int"]),
        (EAGLE3, {"draft_vocab_size": 41}, ["draft_vocab_size=41: must be 1 to vocab_size=40"]),
        (EAGLE3, {"draft_vocab_size": 16}, ["lm_head.weight has shape (15, 24)", "(16, 24)"]),
        (EAGLE3, {"draft_vocab_size": "absent"}, ["has no draft_vocab_size; add it"]),
        (EAGLE3, {"fc_norm": True}, ["lacks tensors fc_norm.0.weight"]),
        (EAGLE3, {"norm_before_residual": True}, ["norm_before_residual=True", "only False is"]),
        (EAGLE3, {"norm_before_fc": True}, ["norm_before_fc=True is not supported"]),
        (EAGLE3, {"target_hidden_size": 48}, ["lacks tensors embed_tokens.weight"]),
        (EAGLE3, {"target_hidden_size": 0}, ["target_hidden_size=0: must be positive"]),
        (
            CONFIGS["eagle3-narrow"],
            {"target_hidden_size": 24},
            ["fc.weight has shape (24, 84)", "implies (24, 72)"],
        ),
        (EAGLE, {"rope_parameters": {"rope_type": "longrope"}}, ["rope_type='longrope' is not"]),
        (EAGLE3, {"eagle_aux_hidden_state_layer_ids": 3}, ["ids=3: must be a list of layer"]),
        (EAGLE3, {"eagle_aux_hidden_state_layer_ids": ["1"]}, ["ids=['1']: must be a list"]),
        (EAGLE3, {"eagle_aux_hidden_state_layer_ids": [-1, 2, 3]}, ["aux_layers=(-1, 2, 3)"]),
        (EAGLE3, {"eagle_aux_hidden_state_layer_ids": [1, 2]}, ["fc.weight", "(24, 48)"]),
        (MEDUSA, {"medusa_num_heads": "absent"}, ["has no medusa_num_heads; add it"]),
        (MEDUSA, {"medusa_num_heads": 2}, ["unexpected tensors 2.0.linear.bias"]),
        (MEDUSA, {"medusa_num_heads": 0}, ["num_heads=0: must be at least 1"]),
        (MEDUSA, {"medusa_num_heads": "3"}, ["num_heads='3': must be int"]),
        (MEDUSA, {"medusa_num_layers": 1}, ["lacks tensors 0.1.weight"]),
        (MEDUSA, {"tie_lm_head": True}, ["lacks tensors 0.lm_proj.weight"]),
        (CONFIGS["medusa-tied"], {"tie_lm_head": False}, ["lacks tensors 0.2.weight"]),
        (MEDUSA, {"medusa_num_heads": 10**7}, ["medusa_num_heads=10000000: the files have 15"]),
        (EAGLE, {"max_position_embeddings": "x"}, ["max_position_embeddings='x': must be int"]),
        (EAGLE, {"tie_word_embeddings": 1}, ["tie_word_embeddings=1: must be bool"]),
        (EAGLE3, {"tie_word_embeddings": True}, ["tie_word_embeddings=True", "only False is"]),
        (EAGLE3, {"rms_norm_eps": -1.0}, ["rms_norm_eps=-1.0"]),
        (EAGLE, {"num_attention_heads": 0}, ["num_attention_heads=0: must be at least 1"]),
        (EAGLE3, {"quantization_config": {}}, ["quantization_config=None: quantised weights"]),
        (MODEL, {"num_hidden_layers": 2}, ["lacks tensors model.layers.1."]),
    ],
)
def test_config_errors(tmp_path, config, changes, parts):
    """Catches a traceback, a setting that is passed over, or weights loaded in part."""
    written(tmp_path, config)
    edit(tmp_path, **changes)
    text = message(hf.load_draft, tmp_path)
    assert all(part in text for part in [str(tmp_path), *parts]), text


def entry(index, value):
    def change(tensors):
        tensors["d2t"] = tensors["d2t"].copy()
        tensors["d2t"][index] = value

    return change


def flip(tensors):
    tensors["t2d"] = ~tensors["t2d"]


TABLE_ERRORS = [
    (drop("d2t"), "has no d2t, though draft_vocab_size=15 is less than vocab_size=40; export"),
    (entry(14, 26), "d2t maps entry 14 to token 40, outside vocab_size=40; export the draft"),
    (entry(3, -4), "d2t maps entry 3 to token -1, outside vocab_size=40; export the draft"),
    (put(d2t=-np.arange(15)), "d2t lists token 0 more than once; export the draft again"),
    (put(d2t=np.zeros(14, int)), "d2t is int64 of shape (14,), not integers of shape (15,);"),
    (put(d2t=np.zeros(15)), "d2t is float64 of shape (15,), not integers of shape (15,);"),
    (put(t2d=np.ones(15, bool)), "t2d marks other tokens than d2t lists"),
]


@pytest.mark.parametrize(("change", "said"), TABLE_ERRORS)
def test_table_errors(tmp_path, change, said):
    """Catches a draft vocabulary that maps to wrong tokens: acceptance collapses silently."""
    for config in (EAGLE3, SHORT):
        written(tmp_path / config.kind, config)
        retensor(tmp_path / config.kind, change)
        assert f"{tmp_path / config.kind}: {said}" in message(hf.load_draft, tmp_path / config.kind)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (flip, "t2d marks other tokens than d2t lists; export the draft again"),
        (drop("midlayer.hidden_norm.weight"), "lacks tensors midlayer.hidden_norm.weight;"),
        (put(fc=np.zeros(3)), "has unexpected tensors fc;"),
    ],
)
def test_tensor_errors(tmp_path, change, said):
    """Catches tensors that are passed over."""
    written(tmp_path, EAGLE3)
    retensor(tmp_path, change)
    assert f"{tmp_path}: {said}" in message(hf.load_draft, tmp_path)


def test_what_is_wrong_is_not_saved(tmp_path):
    """Catches a broken draft that is found out when it is loaded, after its training."""
    new, params = tmp_path / "new", random_params(EAGLE3)
    shape = params | {"fc.kernel": np.zeros((24, 72))}
    text = message(hf.save_draft, new, EAGLE3, shape)
    assert "fc.kernel has shape (24, 72), the configuration implies (72, 24)" in text
    assert "dtype='int8'" in message(hf.save_draft, new, EAGLE3, params, "int8")
    for config in (EAGLE3, SHORT):
        twice = random_params(config) | {"d2t": -np.arange(15)}
        text = message(hf.save_draft, new, config, twice)
        assert "params: d2t lists token 0 more than once" in text
    del params["d2t"]
    assert "params: lacks tensors d2t" in message(hf.save_draft, new, EAGLE3, params)
    params = random_params(EAGLE3)
    text = message(hf.save_draft, new, EAGLE3, params, coverage=97.0)
    assert "coverage=97.0: must be 0 to 1" in text
    text = message(hf.save_draft, new, EAGLE, random_params(EAGLE), coverage=0.9)
    assert "coverage=0.9: a draft of kind 'eagle' has the target's vocabulary" in text
    assert not new.exists()


def test_missing_files(tmp_path):
    """Catches a traceback where a directory is empty."""
    assert "config.json: no such file" in message(hf.load_draft, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "has no model.safetensors" in message(hf.load_draft, tmp_path)


@pytest.mark.parametrize("config", [EAGLE, SHORT, EAGLE3, MEDUSA, MODEL])
def test_check_fit(config):
    """Catches a draft of another target, whose guesses would be noise or out of range."""
    hf.check_fit(TARGET, config)
    remedy = "give a draft that was trained for this target"
    other = dataclasses.replace(config, vocab_size=41)
    said = f"vocab_size: the target has 40, the draft 41; {remedy}"
    assert message(hf.check_fit, TARGET, other) == said
    wide = dataclasses.replace(config, hidden_size=28)
    if config is MODEL:
        hf.check_fit(TARGET, wide)
    else:
        said = f"hidden_size: the target has 24, the draft 28; {remedy}"
        assert message(hf.check_fit, TARGET, wide) == said


def test_check_fit_of_layers():
    """Catches residual streams that the target doesn't have; L itself leaves the last layer."""
    shallow = dataclasses.replace(TARGET, num_hidden_layers=8)
    text = message(hf.check_fit, shallow, EAGLE3)
    assert text.startswith("aux_layers: the target has 8 layers, the draft reads (1, 4, 9); give")
