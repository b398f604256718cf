"""Published heads and exports, against numpy that reads the files by itself.

What goes wrong between two layouts lowers acceptance and raises no error. So each of the known
mistakes is made here on purpose, and the comparison must see it.
"""

import dataclasses
import functools
import json
import shutil
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import safetensors.numpy
import torch
from model_directories import assert_same, edit, message, random_params

from eagle_jax.checkpoint import export as exporting
from eagle_jax.checkpoint import files, hf
from eagle_jax.checkpoint.lazy_tensor import lazily
from eagle_jax.config import Eagle3Config, EagleConfig, MedusaConfig, TransformerConfig
from eagle_jax.drafters import registry
from eagle_jax.drafters.eagle3.checkpoint import Eagle3Files
from eagle_jax.drafters.files import ExportTarget
from eagle_jax.models import Transformer, bind
from eagle_jax.models.transformer import packed_mask

# Seven layers: the official rule gives 2, 3, 4.
TARGET = TransformerConfig(
    vocab_size=40,
    hidden_size=24,
    intermediate_size=36,
    num_hidden_layers=7,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    rope_theta=5e5,
    max_position_embeddings=321,
)
D, E, HEADS, KV, F, V, DRAFT_V = 24, 8, 4, 2, 56, 40, 15
TOKENS = [3, 17, 0, 39, 8, 8, 21]
# The official files say this much; `rope_theta` only where it is not 10000.
KEYS = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "num_hidden_layers": 1,
    "hidden_size": D,
    "intermediate_size": F,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "head_dim": E,
    "vocab_size": V,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "float32",
}


@functools.cache
def target_params() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    return {
        name: (0.3 * rng.normal(size=shape) + name.endswith("scale")).astype(np.float32)
        for name, shape in hf.shapes(TARGET).items()
    }


@functools.cache
def streams() -> list[np.ndarray]:
    pair = reference.Pair(wide(target_params()), TARGET, {})
    return reference.residuals(pair, TOKENS[:-1])


def wide(params):
    return {n: x.astype(np.float64) if x.dtype.kind == "f" else x for n, x in params.items()}


def head(
    kind: str,
    *,
    prefix: str = "",
    bias=True,
    qkv_bias=False,
    fc_norm=False,
    embedding=True,
    width: int = D,
):
    """A head as its authors publish it: torch tensors by their names on disk."""
    if kind == "medusa":
        return medusa_heads()
    d = width
    inputs = 2 * d if kind == "eagle3" else d
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (HEADS * E, inputs),
        "self_attn.k_proj.weight": (KV * E, inputs),
        "self_attn.v_proj.weight": (KV * E, inputs),
        "self_attn.o_proj.weight": (d, HEADS * E),
        "mlp.gate_proj.weight": (F, d),
        "mlp.up_proj.weight": (F, d),
        "mlp.down_proj.weight": (d, F),
        "post_attention_layernorm.weight": (d,),
    }
    if qkv_bias:
        shapes |= {
            f"self_attn.{n}_proj.bias": shapes[f"self_attn.{n}_proj.weight"][:1] for n in "qkv"
        }
    if kind == "eagle3":
        shapes |= {"hidden_norm.weight": (d,), "input_layernorm.weight": (d,)}
        prefix = prefix or "midlayer."
    shapes = {(prefix or "layers.0.") + name: shape for name, shape in shapes.items()}
    if kind == "eagle3":
        shapes |= {"fc.weight": (d, 3 * D), "norm.weight": (d,), "lm_head.weight": (DRAFT_V, d)}
        if fc_norm:
            shapes |= {f"fc_norm.{i}.weight": (D,) for i in range(3)}
    else:
        shapes |= {"fc.weight": (D, 2 * D)} | ({"fc.bias": (D,)} if bias else {})
    torch.manual_seed(1)
    tensors = {n: 0.4 * torch.randn(s) + ("norm" in n) for n, s in shapes.items()}
    if d != D:
        tensors["embed_tokens.weight"] = torch.randn(V, d)
    elif embedding:
        tensors["embed_tokens.weight"] = torch.tensor(target_params()["embed_tokens.embedding"])
    if kind == "eagle3":
        known = torch.randperm(V)[:DRAFT_V].sort().values
        tensors["d2t"] = known - torch.arange(DRAFT_V)
        tensors["t2d"] = torch.isin(torch.arange(V), known)
    return tensors


def medusa_heads():
    """Two heads, each with a residual block and a vocabulary head of its own."""
    torch.manual_seed(1)
    tensors = {}
    for i in range(2):
        tensors[f"{i}.0.linear.weight"] = 0.4 * torch.randn(D, D)
        tensors[f"{i}.0.linear.bias"] = 0.4 * torch.randn(D)
        tensors[f"{i}.1.weight"] = 0.4 * torch.randn(V, D)
    return tensors


def publish(directory, kind, keys, **variant):
    directory.mkdir(parents=True)
    name = "medusa_lm_head.pt" if kind == "medusa" else "pytorch_model.bin"
    torch.save(head(kind, **variant), directory / name)
    own = {"draft_vocab_size": DRAFT_V} if kind == "eagle3" else {}
    if kind != "medusa":  # of which the files say nothing else
        own |= KEYS
    (directory / "config.json").write_text(json.dumps(own | keys))
    return directory


AUX = "eagle_aux_hidden_state_layer_ids"
LINEAR = {"type": "linear", "factor": 3.0}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 90}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "eagle1": ("eagle", {}, {}),
    "eagle1 without biases, base of its own": (
        "eagle",
        {"bias": False, "rope_theta": 300.0},
        {"bias": False, "embedding": False},
    ),
    "eagle1 with q, k, v biases": ("eagle", {"bias": True, "qkv_bias": True}, {"qkv_bias": True}),
    "eagle1 with biases that no key tells": ("eagle", {}, {"qkv_bias": True}),
    "eagle3": ("eagle3", {}, {"embedding": False}),
    "eagle3 of layers.0": ("eagle3", {"rope_theta": 300.0}, {"prefix": "layers.0."}),
    "eagle3 with fc_norm, normed output": (
        "eagle3",
        {"norm_output": True, "target_hidden_size": D},
        {"fc_norm": True},
    ),
    "eagle3 with biases": ("eagle3", {"qkv_bias": True}, {"qkv_bias": True}),
    "eagle3 narrower than its target": (
        "eagle3",
        {"hidden_size": 16, "target_hidden_size": D},
        {"width": 16, "fc_norm": True},
    ),
    "eagle1 with linear scaling": ("eagle", {"rope_scaling": LINEAR}, {}),
    "eagle3 with linear scaling": ("eagle3", {"rope_scaling": LINEAR}, {}),
    "eagle3 with llama3 scaling": ("eagle3", {"rope_theta": 300.0, "rope_scaling": LLAMA3}, {}),
    "medusa": ("medusa", {"medusa_num_heads": 2, "base_model_name_or_path": "a/target"}, {}),
    "eagle3 of vLLM's layers": ("eagle3", {AUX: [0, 3, 7]}, {}),
    "eagle3 of SGLang's layers": ("eagle3", {"eagle_config": {AUX: [1, 2, 5]}}, {}),
}


def read_by_hand(directory) -> tuple[dict[str, np.ndarray], Any]:
    """Arrays and configuration for `reference`, by the rules of the layouts' own documents."""
    settings = json.loads((directory / "config.json").read_text())
    settings |= settings.get("transformer_layer_config", {})
    published = [directory / "pytorch_model.bin", directory / "medusa_lm_head.pt"]
    if any(path.exists() for path in published):
        (path,) = (path for path in published if path.exists())
        found = torch.load(path, weights_only=True)
        found = {name: tensor.numpy() for name, tensor in found.items()}
    else:
        (path,) = directory.glob("*.safetensors")
        found = safetensors.numpy.load_file(path)
    if "0.1.weight" in found:
        return medusa_by_hand(found)
    eagle3 = "d2t" in found
    arrays = {}
    for name, array in found.items():
        if eagle3:
            name = name.replace("layers.0.", "midlayer.")
        stem, _, leaf = name.rpartition(".")
        if stem == "embed_tokens":
            name = "embed_tokens.embedding"
        elif leaf == "weight":
            name = f"{stem}.kernel" if array.ndim == 2 else f"{stem}.scale"
            array = array.T
        arrays[name] = array
    layers = settings.get(AUX, [2, 3, 4])
    if "eagle_config" in settings and AUX not in settings:
        layers = [layer + 1 for layer in settings["eagle_config"][AUX]]
    scaling = settings.get("rope_scaling")
    if scaling is not None:
        scaling.setdefault("rope_type", scaling.get("type"))
    config = types.SimpleNamespace(
        head_dim=E,
        num_attention_heads=HEADS,
        num_key_value_heads=KV,
        rms_norm_eps=1e-6,
        rope_theta=settings.get("rope_theta", 10000.0),
        rope_scaling=None if scaling is None else types.SimpleNamespace(**scaling),
        vocab_size=V,
        aux_layers=layers,
        fc_norm="fc_norm.0.scale" in arrays,
        norm_output=settings.get("norm_output", False),
    )
    return wide(arrays), config


def medusa_by_hand(found) -> tuple[dict[str, np.ndarray], Any]:
    arrays = {}
    for i in range(2):
        arrays[f"heads.{i}.blocks.0.linear.kernel"] = found[f"{i}.0.linear.weight"].T
        arrays[f"heads.{i}.blocks.0.linear.bias"] = found[f"{i}.0.linear.bias"]
        arrays[f"heads.{i}.lm_head.kernel"] = found[f"{i}.1.weight"].T
    config = types.SimpleNamespace(num_heads=2, num_layers=1, tie_lm_head=False)
    return wide(arrays), config


def theirs(directory) -> np.ndarray:
    """States and scores [t, d + V] (Medusa: scores of all heads) by slow arithmetic."""
    arrays, config = read_by_hand(directory)
    medusa = "heads.0.lm_head.kernel" in arrays
    kind = "medusa" if medusa else "eagle3" if "d2t" in arrays else "eagle"
    pair = reference.Pair(wide(target_params()), TARGET, {kind: (arrays, config)})
    features, _ = reference.target(pair, TOKENS[:-1])
    if kind == "medusa":
        return np.concatenate(reference.medusa(pair, features), axis=-1)
    if kind == "eagle3":
        found = reference.draft3(pair, reference.fused(pair, streams()), TOKENS[1:])
        return np.concatenate(found, axis=-1)
    state = reference.draft(pair, features, TOKENS[1:])
    return np.concatenate([state, reference.head(pair, state)], axis=-1)


def ours(directory, mistake=lambda config, params: (config, params)) -> np.ndarray:
    """The same by the library; `mistake` changes what it read."""
    config, params = mistake(*hf.load_draft(directory, TARGET))
    known = {name: jnp.asarray(x) for name, x in params.items()}
    weights = {name: jnp.asarray(x) for name, x in target_params().items()}
    tokens = jnp.asarray(TOKENS[1:])[None]
    mask = packed_mask(jnp.zeros((1, len(TOKENS) - 1), jnp.int32))
    positions = jnp.arange(len(TOKENS) - 1)[None]

    @jax.jit
    def run(known, weights, features):
        module = bind(registry.by_kind(config.kind).module_class(), config, known)
        target = bind(Transformer, TARGET, weights)
        if config.kind == "medusa":
            return jnp.concatenate(module.logits(features, target), axis=-1)
        words = module.embed(tokens, target)
        state, _ = module(words, module.fuse(features), positions, mask)
        scores = module.logits(state, target)
        if (ids := module.tokens()) is not None:
            scores = jnp.full((1, len(TOKENS) - 1, V), -jnp.inf).at[..., ids].set(scores)
        return jnp.concatenate([state, scores], axis=-1)

    if config.kind == "eagle3":
        features = np.concatenate([streams()[i] for i in config.aux_layers], axis=-1)
    else:
        pair = reference.Pair(wide(target_params()), TARGET, {})
        features = reference.target(pair, TOKENS[:-1])[0]
    return np.asarray(run(known, weights, jnp.asarray(features, jnp.float32)[None]))[0]


def check_same(got: np.ndarray, expected: np.ndarray, error: float = 1e-4) -> None:
    """Up to `error` of the largest number; -inf at the same places."""
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(expected))
    size = abs(expected[np.isfinite(expected)]).max()
    np.testing.assert_allclose(got, expected, rtol=error, atol=error * size)


def export(source, to, layout, **options):
    config, params = hf.open_draft(source, TARGET)
    embedding = lazily(target_params()["embed_tokens.embedding"])
    target = ExportTarget(TARGET, embedding, "some/target", ["LlamaForCausalLM"])
    with files.staged(to) as directory:
        exporting.write(
            directory,
            config,
            params,
            layout,
            "float32",
            target=target,
            embedding=embedding,
            **options,
        )
    return to


@pytest.mark.parametrize("name", VARIANTS)
def test_heads_compute_what_their_authors_files_say(tmp_path, name):
    """Catches a bias or a norm dropped, a transpose, the target's theta, layers off by one, and
    files that others publish and this library refuses."""
    kind, keys, variant = VARIANTS[name]
    source = publish(tmp_path / "head", kind, keys, **variant)
    check_same(ours(source), theirs(source))


@pytest.mark.parametrize("name", VARIANTS)
def test_exports_compute_the_same_and_come_back_bit_by_bit(tmp_path, name):
    """Catches whatever an export loses: offsets, biases, the base, layers counted otherwise."""
    kind, keys, variant = VARIANTS[name]
    source = publish(tmp_path / "head", kind, keys, **variant)
    config, params = hf.load_draft(source, TARGET)
    narrow = isinstance(config, Eagle3Config) and config.target_hidden_size
    for layout in exporting.LAYOUTS:
        if (layout != "official" and kind == "medusa") or (narrow and layout == "sglang"):
            assert layout in message(export, source, tmp_path / layout, layout)
            continue
        if (layout, kind) == ("speculators", "eagle"):
            continue
        there = export(source, tmp_path / layout, layout)
        check_same(theirs(there), theirs(source), 1e-9)
        back = export(there, tmp_path / f"{layout}-back", "official")
        found, again = hf.load_draft(back)
        if layout == "sglang" and isinstance(found, EagleConfig) and "fc.bias" not in params:
            assert not again.pop("fc.bias").any()  # SGLang would leave a missing one random
            found = dataclasses.replace(found, bias=False)
        assert found == config
        assert_same(again, params)


def test_medusa_from_torch_and_back(tmp_path):
    """Catches heads under another name, and a layout that a exporting stack does not have."""
    config = MedusaConfig(vocab_size=40, hidden_size=24, num_heads=2)
    params = random_params(config)
    hf.save_draft(tmp_path / "saved", config, params, "float32")
    tensors = safetensors.numpy.load_file(tmp_path / "saved" / "model.safetensors")
    (tmp_path / "head").mkdir()
    shutil.copy(tmp_path / "saved" / "config.json", tmp_path / "head")
    torch.save(
        {name: torch.tensor(x) for name, x in tensors.items()},
        tmp_path / "head" / "medusa_lm_head.pt",
    )
    back = export(tmp_path / "head", tmp_path / "back", "official")
    found, again = hf.load_draft(back)
    assert found == config
    assert_same(again, params)
    text = message(export, tmp_path / "head", tmp_path / "new", "sglang")
    assert "kind 'medusa' has no layout in sglang, which knows eagle, eagle3" in text
    assert not (tmp_path / "new").exists()


def test_words_of_the_serving_stacks(tmp_path):
    """Catches a key that a stack reads and finds missing, whose default is another model."""
    source = publish(tmp_path / "head", "eagle3", {"rope_theta": 300.0}, embedding=False)
    stored = {x: export(source, tmp_path / x, x) for x in exporting.LAYOUTS}
    said = {x: json.loads((path / "config.json").read_text()) for x, path in stored.items()}
    tensors = {
        x: safetensors.numpy.load_file(path / "model.safetensors") for x, path in stored.items()
    }
    for layout, settings in said.items():
        own = settings.get("transformer_layer_config", settings)
        assert (own["rope_theta"], own["max_position_embeddings"]) == (300.0, 321), layout
        assert settings["norm_before_residual"] is False  # vLLM's default is the other
        # The official code would leave the embedding random if it found the first.
        assert settings.get("target_hidden_size") == (None if layout == "official" else D)
        assert settings["draft_vocab_size"] == DRAFT_V
        assert tensors[layout]["d2t"].dtype == np.int64 and tensors[layout]["t2d"].dtype == bool
    assert said["sglang"]["architectures"] == ["LlamaForCausalLMEagle3"]
    assert said["sglang"]["eagle_config"][AUX] == [1, 2, 3] and AUX not in said["sglang"]
    vllm = said["speculators"]
    assert vllm["architectures"] == ["Eagle3Speculator"] and vllm[AUX] == [2, 3, 4]
    assert vllm["speculators_config"]["verifier"]["name_or_path"] == "some/target"
    assert {"layers.0.hidden_norm.weight", "embed_tokens.weight"} <= tensors["speculators"].keys()
    np.testing.assert_array_equal(
        tensors["speculators"]["embed_tokens.weight"], target_params()["embed_tokens.embedding"]
    )
    first = export(publish(tmp_path / "one", "eagle", {}), tmp_path / "one-sglang", "sglang")
    settings = json.loads((first / "config.json").read_text())
    assert settings["architectures"] == ["LlamaForCausalLMEagle"]
    assert "bias" not in settings  # there it would mean the projections of attention


# Known mistakes, made in a file: tensors and settings -> changed in place.
def lose_d2t(tensors, settings):
    del tensors["d2t"]


def zero_d2t(tensors, settings):
    tensors["d2t"] = np.zeros_like(tensors["d2t"])
    tensors["t2d"] = np.arange(V) < DRAFT_V


def absolute_d2t(tensors, settings):
    tensors["d2t"] = np.arange(DRAFT_V) + tensors["d2t"]
    del tensors["t2d"]


def swap_columns(tensors, settings):
    width = tensors["fc.weight"].shape[1] // D
    order = np.roll(np.arange(width * D), D)
    tensors["fc.weight"] = np.ascontiguousarray(tensors["fc.weight"][:, order])


def drop_bias(tensors, settings):
    del tensors["fc.bias"]
    settings["bias"] = False


def targets_theta(tensors, settings):
    for part in (settings, settings.get("transformer_layer_config", {})):
        if "rope_theta" in part:
            part["rope_theta"] = part["rope_parameters"]["rope_theta"] = 5e5


def shift_layers(tensors, settings):
    part = settings if AUX in settings else settings["eagle_config"]
    part[AUX] = [layer + 1 for layer in part[AUX]]


def narrow_attention(tensors, settings):
    for name in [name for name in tensors if name.endswith(("q_proj.weight", "k_proj.weight"))]:
        tensors[name] = np.ascontiguousarray(tensors[name][:, :D])


def interleave(tensors, settings):
    """Rows of q and k in the order of rotary pairs (0, 1), (2, 3), as Meta's own files have it."""
    for name in [name for name in tensors if name.endswith(("q_proj.weight", "k_proj.weight"))]:
        heads = tensors[name].reshape(-1, 2, E // 2, tensors[name].shape[1])
        tensors[name] = np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(tensors[name].shape)


def random_embedding(tensors, settings):
    shape = tensors["embed_tokens.weight"].shape
    tensors["embed_tokens.weight"] = np.random.default_rng(0).normal(size=shape)


MISTAKES = [
    ("eagle3", random_embedding),
    ("eagle", random_embedding),
    ("eagle3", lose_d2t),
    ("eagle3", zero_d2t),
    ("eagle3", absolute_d2t),
    ("eagle3", swap_columns),
    ("eagle3", targets_theta),
    ("eagle3", shift_layers),
    ("eagle3", narrow_attention),
    ("eagle3", interleave),
    ("eagle", swap_columns),
    ("eagle", drop_bias),
    ("eagle", targets_theta),
    ("eagle", interleave),
]


# Speculators' layout has no EAGLE-1, SGLang's no embedding.
SEEDED = [
    pytest.param(kind, mistake, layout, id=f"{kind}-{mistake.__name__}-{layout}")
    for kind, mistake in MISTAKES
    for layout in exporting.LAYOUTS
    if (kind, layout) != ("eagle", "speculators")
    and (mistake, layout) != (random_embedding, "sglang")
]


@pytest.mark.parametrize(("kind", "mistake", "layout"), SEEDED)
def test_seeded_mistakes_are_seen(tmp_path, kind, mistake, layout):
    """Catches a parity test that would pass whatever an export does: every known silent failure,
    made in an export that was right before, must be an error or other numbers."""
    source = publish(tmp_path / "head", kind, {"rope_theta": 300.0}, embedding=False)
    there = export(source, tmp_path / "there", layout)
    check_same(ours(there), theirs(source))
    tensors = safetensors.numpy.load_file(there / "model.safetensors")
    settings = json.loads((there / "config.json").read_text())
    mistake(tensors, settings)
    safetensors.numpy.save_file(tensors, there / "model.safetensors")
    (there / "pytorch_model.bin").unlink(missing_ok=True)  # it would be read first
    (there / "config.json").write_text(json.dumps(settings))
    # The official loaders take the embedding of the file, the library the target's.
    result = theirs if mistake is random_embedding else ours
    try:
        got = result(there)
    except ValueError as error:
        assert str(there) in str(error) and "\n" not in str(error)
        return
    with pytest.raises(AssertionError):
        check_same(got, theirs(source), 1e-3)


def columns_swapped(config, params):
    return config, params | {"fc.kernel": np.roll(params["fc.kernel"], D, axis=0)}


def half_of_attention(config, params):
    kernels = {f"midlayer.self_attn.{name}_proj.kernel" for name in "qkv"}
    upper = np.arange(2 * D)[:, None] < D
    return config, {n: np.where(upper, x, 0) if n in kernels else x for n, x in params.items()}


def rotary_pairs(config, params):
    order = np.arange(E).reshape(2, E // 2).T.reshape(-1)
    changed = dict(params)
    for name in [name for name in params if name.endswith(("q_proj.kernel", "k_proj.kernel"))]:
        heads = params[name].reshape(len(params[name]), -1, E)
        changed[name] = heads[..., order].reshape(params[name].shape)
    return config, changed


def without(field, name=None):
    """A field set back to nothing, and the array that belongs to it left out."""

    def change(config, params):
        kept = {key: x for key, x in params.items() if key != name}
        nothing = None if field == "rope_scaling" else False
        return dataclasses.replace(config, **{field: nothing}), kept

    return change


def without_biases(config, params):
    kept = {n: x for n, x in params.items() if not n.endswith("_proj.bias")}
    return dataclasses.replace(config, attention_bias=False), kept


def theta(config, params):
    return dataclasses.replace(config, rope_theta=TARGET.rope_theta), params


def layers(by):
    def change(config, params):
        shifted = tuple(layer + by for layer in config.aux_layers)
        return dataclasses.replace(config, aux_layers=shifted), params

    return change


def other(name, value):
    return lambda config, params: (config, params | {name: value(params[name])})


def noise(x):
    return np.random.default_rng(0).normal(size=x.shape).astype(np.float32)


MISREADINGS = {
    "d2t lost": ("eagle3", other("d2t", np.zeros_like)),
    "d2t of another sign": ("eagle3", other("d2t", np.negative)),
    "random embedding": ("eagle3 narrower than its target", other("embed_tokens.embedding", noise)),
    "fc bias dropped": ("eagle1", without("bias", "fc.bias")),
    "q, k, v biases dropped": ("eagle1 with q, k, v biases", without_biases),
    "fc columns swapped, eagle1": ("eagle1", columns_swapped),
    "fc columns swapped, eagle3": ("eagle3", columns_swapped),
    "the target's theta, eagle1": ("eagle1", theta),
    "the target's theta, eagle3": ("eagle3", theta),
    "layers off by one up": ("eagle3", layers(1)),
    "layers off by one down": ("eagle3 of SGLang's layers", layers(-1)),
    "attention of half its width": ("eagle3", half_of_attention),
    "rotary pairs, eagle1": ("eagle1", rotary_pairs),
    "rotary pairs, eagle3": ("eagle3", rotary_pairs),
    "scaling dropped": ("eagle3 with linear scaling", without("rope_scaling")),
    "norm_output dropped": ("eagle3 with fc_norm, normed output", without("norm_output")),
}


@pytest.mark.parametrize("name", MISREADINGS)
def test_seeded_misreadings_are_seen(tmp_path, name):
    """Catches a parity test that would pass though the library reads a head wrongly."""
    variant, mistake = MISREADINGS[name]
    kind, keys, options = VARIANTS[variant]
    source = publish(tmp_path / "head", kind, keys, **options)
    with pytest.raises(AssertionError):
        check_same(ours(source, mistake), theirs(source), 1e-3)


@pytest.mark.parametrize("layout", exporting.LAYOUTS)
@pytest.mark.parametrize(
    ("part", "mistake"),
    [
        ("export_tensors", lambda x: x.pop("d2t")),
        ("export_tensors", lambda x: x.update(d2t=x["d2t"] * 0)),
        (
            "export_tensors",
            lambda x: x.update({"fc.weight": lazily(np.zeros((D, 3 * D), np.float32))}),
        ),
        ("export_tensors", lambda x: x.pop("norm.weight")),
        ("export_settings", lambda x: targets_theta({}, x)),
        ("export_settings", lambda x: shift_layers({}, x)),
        ("export_settings", lambda x: x.update(draft_vocab_size=DRAFT_V + 1)),
        ("export_settings", lambda x: x.update(norm_before_residual=True)),
    ],
)
def test_an_export_that_reads_otherwise_does_not_count(
    tmp_path, monkeypatch, layout, part, mistake
):
    """Catches an export that is not read again: a fault of the writer would reach a user."""
    source = publish(tmp_path / "head", "eagle3", {"rope_theta": 300.0})
    right = getattr(Eagle3Files, part)

    def wrong(*arguments):
        result = right(*arguments)
        mistake(result)
        return result

    monkeypatch.setattr(Eagle3Files, part, wrong)
    message(export, source, tmp_path / "new", layout)
    assert [path.name for path in tmp_path.iterdir()] == ["head"]


def test_an_embedding_that_is_written_wrongly_does_not_count(tmp_path, monkeypatch):
    """Catches an embedding of random numbers in an export: only its reader's acceptance tells."""
    source = publish(tmp_path / "head", "eagle3", {})
    right = exporting.safetensors.write

    def wrong(path, tensors, *arguments):
        right(path, tensors | {"embed_tokens.weight": noise(np.zeros((V, D)))}, *arguments)

    monkeypatch.setattr(exporting.safetensors, "write", wrong)
    said = message(export, source, tmp_path / "new", "speculators")
    assert "embed_tokens.weight reads otherwise than written" in said
    assert [path.name for path in tmp_path.iterdir()] == ["head"]


def test_speculators_files_without_a_word(tmp_path):
    """Catches a head that norms before the residual, as such files mean without the key."""
    source = publish(tmp_path / "head", "eagle3", {})
    there = export(source, tmp_path / "there", "speculators")
    edit(there, norm_before_residual="absent")
    assert "norm_before_residual=True is not supported" in message(hf.load_draft, there, TARGET)


def test_a_head_for_a_target_of_another_width(tmp_path):
    """Catches a traceback for heads that are narrower than their target, or for another one."""
    source = publish(tmp_path / "head", "eagle3", {"target_hidden_size": 2 * D})
    said = f"fc.weight has shape ({D}, {3 * D}), the configuration implies ({D}, {6 * D})"
    assert said in message(hf.load_draft, source, TARGET)
    narrow = {"hidden_size": 16, "target_hidden_size": D}
    source = publish(tmp_path / "narrow", "eagle3", narrow, width=16)
    config, _ = hf.load_draft(source, TARGET)
    wide = dataclasses.replace(TARGET, hidden_size=32)
    said = f"hidden_size: the target has 32, the draft {D}"
    assert said in message(hf.check_fit, wide, config)


def test_a_missing_table_of_a_torch_head(tmp_path):
    """Catches acceptance that collapses because a head lost its offsets."""
    source = publish(tmp_path / "head", "eagle3", {})
    tensors = torch.load(source / "pytorch_model.bin", weights_only=True)
    del tensors["d2t"]
    torch.save(tensors, source / "pytorch_model.bin")
    assert f"{source}: has no d2t, though draft_vocab_size=15" in message(
        hf.load_draft, source, TARGET
    )
    assert registry.recognise({}, tensors).kind == "eagle3"
