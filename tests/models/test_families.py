"""Every family and flag against transformers (torch): logits, trees, greedy text, files."""

import dataclasses
import functools
import json
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_directories import assert_same, edit, message

import eagle_jax
from eagle_jax.checkpoint import config_json, hf, safetensors
from eagle_jax.config import RopeScaling, TransformerConfig
from eagle_jax.decode.methods.prompt_lookup import PromptLookup
from eagle_jax.layout import PLAIN, Layout
from eagle_jax.models import Transformer, bind, init_params
from eagle_jax.models.transformer import packed_mask
from eagle_jax.models.weight_layout import fuse

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LENGTH = 24
# head_dim is not hidden_size / num_attention_heads; a low base turns slow dimensions visibly.
LLAMA = TransformerConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rope_theta=300.0,
    rms_norm_eps=1e-4,
    max_position_embeddings=256,
)


def llama(**changes: Any) -> TransformerConfig:
    return dataclasses.replace(LLAMA, **changes)


def yarn(**changes: Any) -> RopeScaling:
    return RopeScaling("yarn", 4.0, original_max_position_embeddings=64, **changes)


SLIDES, SEES_ALL = "sliding_attention", "full_attention"
# Windows are short: of 24 tokens, and within a tree of depth 6.
WINDOW = 5
GEMMA2 = llama(
    hidden_act="gelu_pytorch_tanh",
    post_norms=True,
    unit_offset_norm=True,
    scale_embeddings=True,
    tie_word_embeddings=True,
    query_pre_attn_scalar=24,
    attn_logit_softcapping=2.0,
    final_logit_softcapping=1.0,
    sliding_window=WINDOW,
    layer_types=(SLIDES, SEES_ALL),
)
GEMMA3 = dataclasses.replace(
    GEMMA2,
    attn_logit_softcapping=None,
    final_logit_softcapping=None,
    qk_norm=True,
    num_hidden_layers=3,
    layer_types=(SLIDES, SLIDES, SEES_ALL),
    rope_theta=1000.0,
    rope_local_base_freq=50.0,
)
MIXTRAL = llama(num_experts=4, num_experts_per_tok=2)
QWEN3_MOE = llama(
    qk_norm=True,
    num_experts=5,
    num_experts_per_tok=2,
    moe_intermediate_size=20,
    norm_topk_prob=False,
)
CASES: dict[str, tuple[str, TransformerConfig]] = {
    "llama linear": ("llama", llama(rope_scaling=RopeScaling("linear", 4.0))),
    "llama 3": (
        "llama",
        llama(
            rope_scaling=RopeScaling(
                "llama3",
                8.0,
                original_max_position_embeddings=64,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
            ),
        ),
    ),
    "llama yarn": ("llama", llama(rope_scaling=yarn())),
    "llama yarn all": (
        "llama",
        llama(
            rope_scaling=yarn(
                beta_fast=8.0, beta_slow=2.0, mscale=0.7, mscale_all_dim=0.4, truncate=False
            )
        ),
    ),
    "mistral": ("mistral", llama(sliding_window=WINDOW)),
    "mistral open": ("mistral", llama(model_type="mistral")),
    "qwen2": ("qwen2", llama(attention_bias=True, head_dim=8)),
    "qwen2 windows": (
        "qwen2",
        llama(
            attention_bias=True,
            head_dim=8,
            sliding_window=WINDOW,
            layer_types=(SEES_ALL, SLIDES),
            rope_scaling=yarn(attention_factor=1.3),
        ),
    ),
    "qwen3": ("qwen3", llama(qk_norm=True, tie_word_embeddings=True)),
    "mixtral": ("mixtral", MIXTRAL),
    "mixtral window": ("mixtral", dataclasses.replace(MIXTRAL, sliding_window=WINDOW)),
    "qwen3_moe": ("qwen3_moe", QWEN3_MOE),
    "qwen3_moe mixed": (
        "qwen3_moe",
        dataclasses.replace(
            QWEN3_MOE, norm_topk_prob=True, mlp_only_layers=(1,), sliding_window=WINDOW
        ),
    ),
    "gemma2": ("gemma2", GEMMA2),
    "gemma2 no caps": (
        "gemma2",
        dataclasses.replace(GEMMA2, attn_logit_softcapping=None, final_logit_softcapping=None),
    ),
    "gemma3": ("gemma3_text", GEMMA3),
    "gemma3 scaled": (
        "gemma3_text",
        dataclasses.replace(
            GEMMA3, rope_scaling=RopeScaling("linear", 8.0), final_logit_softcapping=0.8
        ),
    ),
}


def random_params(config: TransformerConfig) -> dict[str, np.ndarray]:
    """Random also where initial values are 0 or 1, so that a forgotten bias or scale shows.

    A weight's numbers depend on its name only, not on the order of the weights.
    """
    offset = 0 if config.unit_offset_norm else 1

    def one(name: str, shape: tuple[int, ...]) -> np.ndarray:
        rng = np.random.default_rng([7, zlib.crc32(name.encode())])
        if name.endswith("scale"):
            # What layers add must outweigh a scaled embedding, or the text repeats one token.
            loud = 2 if config.post_norms and "post_" in name else 0
            return offset + loud + 0.3 * rng.normal(size=shape)
        if name.startswith("embed") and config.scale_embeddings:
            return 0.1 * rng.normal(size=shape)
        return 0.3 * rng.normal(size=shape)

    return {name: one(name, shape).astype(np.float32) for name, shape in hf.shapes(config).items()}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """The directory of a case, written by us."""

    @functools.cache
    def write(name: str) -> Path:
        path = tmp_path_factory.mktemp(name.replace(" ", "_"))
        config = CASES[name][1]
        hf.save_target(path, config, random_params(config), "float32")
        return path

    return write


def open_theirs(path: Path) -> Any:
    """In transformers; its plain attention, since others leave the softcap out."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def their_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.as_tensor(tokens)).logits.numpy()


def run(config, params, tokens, positions, mask, layout=PLAIN, **cached):
    def apply(params, tokens, positions, mask, cached):
        module = bind(Transformer, config, params, layout)
        output = module(tokens, positions, mask, **cached)
        return output, module.logits(output.features)

    arrays = jax.tree.map(jnp.asarray, (params, tokens, positions, mask, cached))
    return jax.jit(apply)(*arrays)


def causal_pass(config, params, tokens, layout=PLAIN):
    b, t = tokens.shape
    positions = np.broadcast_to(np.arange(t)[None], (b, t))
    mask = packed_mask(jnp.zeros((b, t), jnp.int32))
    return run(config, params, tokens, positions, mask, layout)


def close(got, expected) -> None:
    got, expected = np.asarray(got), np.asarray(expected)
    assert abs(got - expected).max() <= 1e-4 * abs(expected).max()


def random_tokens(rows: int, length: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 61, (rows, length))


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name: str, directory) -> None:
    """Catches any flag of a family that is forgotten, applied twice or in the wrong place."""
    path, (model_type, config) = directory(name), CASES[name]
    model = open_theirs(path)
    assert model.config.model_type == model_type
    tokens = random_tokens(2)
    found, params = hf.load_target(path)
    assert found == config
    _, logits = causal_pass(found, params, tokens)
    close(logits, their_logits(model, tokens))


# node 0 - 1 - 2 - 3 - 4 - 5 - 6, and siblings 7 (of 1), 8 and 9 (below 7): deeper than a window.
_PARENTS = [-1, 0, 1, 2, 3, 4, 5, 0, 7, 8]


def _path(node: int) -> list[int]:
    return [] if node < 0 else [*_path(_PARENTS[node]), node]


TREES = ["mistral", "qwen2 windows", "llama yarn", "mixtral window", "gemma2", "gemma3 scaled"]


@pytest.mark.parametrize("name", TREES)
def test_tree_block_equals_its_paths_run_as_sequences(name: str, directory) -> None:
    """Catches a window that counts cache slots or nodes where it must count positions."""
    path, config = directory(name), CASES[name][1]
    layout = Layout(gate_up_fused=True, qkv_fused=True)
    model, params = open_theirs(path), fuse(hf.load_target(path)[1], config, layout)
    tokens, lengths = random_tokens(2), [14, 3]
    paths = [_path(node) for node in range(len(_PARENTS))]
    nodes = random_tokens(2, len(_PARENTS) + 5)[:, 5:]
    depth = np.array([len(ancestors) - 1 for ancestors in paths])
    mask = np.array([[u in ancestors for u in range(len(paths))] for ancestors in paths])
    whole, _ = causal_pass(config, params, tokens, layout)
    _, got = run(
        config,
        params,
        nodes,
        np.array(lengths)[:, None] + depth[None],
        np.broadcast_to(mask[None], (2, *mask.shape)),
        layout,
        cache=whole.block,  # slots from `lengths` on hold other tokens' keys
        lengths=np.array(lengths),
    )
    for row, length in enumerate(lengths):
        for node, ancestors in enumerate(paths):
            text = np.concatenate([tokens[row, :length], nodes[row, ancestors]])
            close(got[row, node], their_logits(model, text[None])[0, -1])


@pytest.mark.parametrize("names", ["new", "published"])
def test_a_model_that_sees_images_too(names: str, tmp_path) -> None:
    """Catches a text model that is not found inside another, under either writer's names."""
    text = dataclasses.asdict(GEMMA3) | {"layer_types": list(GEMMA3.layer_types)}
    kept = ("hidden_size", "intermediate_size", "num_hidden_layers", "head_dim", "vocab_size")
    kept += ("num_attention_heads", "num_key_value_heads", "sliding_window", "layer_types")
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config={key: text[key] for key in kept} | {"query_pre_attn_scalar": 24},
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=60,
        boi_token_index=59,
        eoi_token_index=58,
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.read(path)
    assert any(name.startswith("vision_tower") or ".vision_tower" in name for name in tensors)
    pair = ("language_model.model.", "model.language_model.")
    old, wanted = pair if names == "new" else pair[::-1]
    renamed = {name.replace(old, wanted): tensor for name, tensor in tensors.items()}
    safetensors.write(path, renamed, {"format": "pt"})
    tokens = random_tokens(2) % 50  # no image's
    found, params = hf.load_target(tmp_path)
    assert found.num_hidden_layers == 3 and found.layer_types == GEMMA3.layer_types
    _, logits = causal_pass(found, params, tokens)
    close(logits, their_logits(model, tokens))


@pytest.mark.parametrize("name", CASES)
def test_greedy_text_equals_transformers(name: str, directory) -> None:
    """Catches a cache, a layout for decoding (stacked experts, fused gates) or a window that is
    right for one pass only."""
    path = directory(name)
    prompt = random_tokens(1, 11)
    options = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        theirs = open_theirs(path).generate(torch.as_tensor(prompt), pad_token_id=0, **options)
    params = eagle_jax.load(path)
    ours = eagle_jax.decode.generate(
        params, prompt[0].tolist(), method="vanilla", max_new_tokens=64, ignore_eos=True
    )
    expected = theirs[0, prompt.shape[1] :].tolist()
    assert len(set(expected)) > 3  # a text that says something
    assert list(ours.tokens) == expected
    if name in ("gemma3", "mixtral window"):
        method = PromptLookup(max_ngram=2, min_ngram=1, length=6)
        drafted = eagle_jax.decode.generate(
            params, prompt[0].tolist(), method=method, max_new_tokens=64, ignore_eos=True
        )
        assert list(drafted.tokens) == expected


@pytest.mark.parametrize("name", CASES)
def test_round_trip_through_transformers_is_bit_exact(name: str, directory, tmp_path) -> None:
    """Catches a family lost on the way, a renamed, transposed or rounded tensor."""
    model_type, config = CASES[name]
    open_theirs(directory(name)).save_pretrained(tmp_path / "theirs")
    found, params = hf.load_target(tmp_path / "theirs")
    assert found == config and found.model_type == model_type
    assert_same(params, random_params(config))
    hf.save_target(tmp_path / "again", found, params, "float32")
    files = [tmp_path / name / "model.safetensors" for name in ("theirs", "again")]
    theirs, again = map(safetensors.read, files)
    assert_same(again, theirs)
    assert hf.load_target(tmp_path / "again")[0].model_type == model_type


EDITS = {
    # What older and foreign files say, or leave to the family's rule.
    "linear by its old keys": (
        "llama linear",
        {
            "rope_parameters": "absent",
            "rope_theta": 700.0,
            "rope_scaling": {"type": "linear", "factor": 3},
        },
    ),
    "yarn with nothing but its factor": (
        "llama yarn",
        {
            "rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 300.0},
            "rope_scaling": "absent",
        },
    ),
    "the window of a mistral is null": ("mistral", {"sliding_window": None}),
    "a switch is off": ("qwen2 windows", {"use_sliding_window": False, "layer_types": "absent"}),
    "windows above a layer": (
        "qwen2 windows",
        {"layer_types": "absent", "max_window_layers": 0},
    ),
    "experts in every second layer": (
        "qwen3_moe mixed",
        {"decoder_sparse_step": 2, "mlp_only_layers": []},
    ),
    "gemma2 by its defaults": (
        "gemma2",
        {
            "layer_types": "absent",
            "attn_logit_softcapping": "absent",
            "final_logit_softcapping": None,
            "query_pre_attn_scalar": "absent",
            "tie_word_embeddings": "absent",
        },
    ),
    "gemma3 by its old keys": (
        "gemma3 scaled",
        {
            "rope_parameters": "absent",
            "rope_theta": 2000.0,
            "rope_local_base_freq": 80.0,
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            "layer_types": "absent",
            "sliding_window_pattern": 2,
        },
    ),
}


@pytest.mark.parametrize("edited", EDITS)
def test_config_keys_mean_what_transformers_takes_them_for(edited: str, directory, tmp_path):
    """Catches another default, another rule for absent keys, null taken for absent."""
    name, changes = EDITS[edited]
    config = CASES[name][1]
    if edited == "experts in every second layer":  # layer 0 is now the one without
        config = dataclasses.replace(config, mlp_only_layers=(0,))
    hf.save_target(tmp_path, config, random_params(config), "float32")
    edit(tmp_path, **changes)
    found, params = hf.load_target(tmp_path)
    _, logits = causal_pass(found, params, random_tokens(1))
    close(logits, their_logits(open_theirs(tmp_path), random_tokens(1)))
    # And the edit was no edit of what does not matter.
    if edited != "experts in every second layer":
        _, before = causal_pass(CASES[name][1], params, random_tokens(1))
        assert abs(np.asarray(before) - np.asarray(logits)).max() > 1e-3


@pytest.mark.parametrize("name", ["qwen2 windows", "mixtral window", "gemma2", "gemma3 scaled"])
def test_bfloat16_runs_and_stays_near(name: str, directory) -> None:
    """Catches a float32 constant that widens a bfloat16 model, and a gate summed in few bits."""
    config, path = CASES[name][1], directory(name)
    tokens = random_tokens(1)
    _, exact = causal_pass(config, hf.load_target(path)[1], tokens)
    params = eagle_jax.load(path, dtype="bfloat16")
    for length in (1, LENGTH):  # few tokens gather their experts, many go through all
        output, logits = causal_pass(
            params.target_config, params.target, tokens[:, :length], params.layout
        )
        assert output.features.dtype == jnp.bfloat16
        assert {x.dtype for x in jax.tree.leaves(output.block)} == {jnp.dtype(jnp.bfloat16)}
        wanted = np.asarray(exact[:, :length])
        assert np.corrcoef(np.ravel(logits), np.ravel(wanted))[0, 1] > 0.97


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("name", ["mixtral", "qwen2 windows", "qwen3_moe mixed", "gemma3"])
def test_initial_parameters_are_those_of_the_checkpoint_format(name: str, joined: bool) -> None:
    """Catches a module renamed away from the names that files have, in any layout."""
    config = CASES[name][1]
    shapes = jax.eval_shape(lambda: init_params(Transformer, config, 0))
    assert {name: x.shape for name, x in shapes.items()} == hf.shapes(config)
    layout = Layout(gate_up_fused=True, qkv_fused=joined)
    fused = jax.eval_shape(lambda: init_params(Transformer, config, 0, layout))
    expected = {name: x.shape for name, x in fuse(random_params(config), config, layout).items()}
    assert {name: x.shape for name, x in fused.items()} == expected


def test_settings_of_no_family_are_not_saved(tmp_path) -> None:
    """Catches a directory that transformers opens as another computation."""
    config = dataclasses.replace(GEMMA2, num_experts=2, num_experts_per_tok=1)
    text = message(hf.save_target, tmp_path / "new", config, random_params(LLAMA))
    assert "num_experts=2" in text and "'gemma2'" in text
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"layer_types": (SLIDES,)}, ["layer_types", "num_hidden_layers=2"]),
        ({"layer_types": (SLIDES, SLIDES)}, ["sliding_window=None"]),
        ({"sliding_window": 0}, ["sliding_window=0"]),
        ({"num_experts": 4, "num_experts_per_tok": 5}, ["num_experts_per_tok=5"]),
        ({"mlp_only_layers": (2,)}, ["mlp_only_layers=(2,)"]),
    ],
)
def test_contradictions_are_told(changes, parts) -> None:
    """Catches a configuration that would fail in the middle of a trace, or not at all."""
    text = message(lambda: llama(**changes))
    assert all(part in text for part in parts), text


def test_packed_sequences_keep_their_windows() -> None:
    """Catches a window over a row in place of one over each segment's own positions."""
    config = CASES["mistral"][1]
    params, tokens = random_params(config), random_tokens(1)
    segments = jnp.array([[1] * 9 + [2] * 15])
    positions = np.array([[*range(9), *range(15)]])
    _, got = run(config, params, tokens, positions, packed_mask(segments))
    close(got[0, :9], causal_pass(config, params, tokens[:, :9])[1][0])
    close(got[0, 9:], causal_pass(config, params, tokens[:, 9:])[1][0])


def test_written_keys_are_plain() -> None:
    """Catches a key that older transformers would read as another model than newer ones."""

    settings = config_json.to_json(CASES["gemma3 scaled"][1], "gemma3_text", "float32")
    assert settings["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    assert settings["rope_theta"] == 1000.0 and settings["rope_local_base_freq"] == 50.0
    assert json.loads(json.dumps(settings)) == settings
