"""Int8 targets and drafts: the arithmetic, loading on one device and on several, texts that stay
equal."""

import dataclasses
import functools
import json
import re

import decoding
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_pair
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import eagle_jax
from eagle_jax import sharding
from eagle_jax.checkpoint import hf, safetensors
from eagle_jax.decode import executables, generate
from eagle_jax.decode.batching.answer_file import answer_file
from eagle_jax.decode.program import Program
from eagle_jax.drafters import registry
from eagle_jax.evaluate import EvalConfig, agreement, metrics
from eagle_jax.layout import PLAIN, Layout
from eagle_jax.models import Transformer, bind, cast, param_shapes, quantize
from eagle_jax.models.matmul import matmul
from eagle_jax.models.transformer import packed_mask
from eagle_jax.params import Draft, Params
from eagle_jax.testing import (
    random_draft,
    random_params,
    tiny_draft,
    tiny_eagle3,
    tiny_medusa,
    tiny_params,
    tiny_target,
)

HALF = 0.5 + 1e-4  # the quotient is rounded before it is rounded to a whole number
METHODS = "vanilla", "eagle chain", "eagle2", "eagle3", "medusa", "lookahead", "speculative"
SETTINGS = {"greedy": {}, "sampled": {"temperature": 0.7, "top_p": 0.9}}


def small(params: Params) -> Params:
    """With an int8 target."""
    return dataclasses.replace(
        params,
        target=quantize.quantize_params(params.target),
        layout=dataclasses.replace(params.layout, quantize="int8"),
    )


def small_drafts(params: Params) -> Params:
    """With int8 drafts."""
    return dataclasses.replace(
        params,
        drafts={
            kind: Draft(
                quantize.quantize_params(draft.params),
                draft.config,
                dataclasses.replace(draft.layout, quantize="int8"),
            )
            for kind, draft in params.drafts.items()
        },
    )


def large(params) -> dict[str, jax.Array]:
    """The float weights that int8 ones stand for."""
    result = dict(params)
    for name in [name for name in params if quantize.quantised(name)]:
        scale = result.pop(name + quantize.SCALE)
        result[name] = quantize.dequantize(params[name], scale, quantize.input_axis(name))
    return result


@functools.cache
def pair() -> Params:
    return small(decoding.random_pair())


def normal(*shape: int, seed: int = 0, dtype=jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("shape", "axis"), [((32, 7), 0), ((32, 2, 5), 0), ((3, 32, 2, 5), 1)])
def test_rounding_is_to_the_nearest_step(shape, axis, dtype) -> None:
    """Catches a scale of the wrong axis, cut-off in place of rounding, and a lost bit of 127."""
    kernel = normal(*shape, dtype=dtype) * jnp.asarray(3, dtype)
    steps, scale = quantize.quantize(kernel, axis)
    assert steps.dtype == jnp.int8 and scale.dtype == jnp.float32
    assert scale.shape == shape[:axis] + shape[axis + 1 :]
    assert steps.shape == (*scale.shape, shape[axis])
    off = jnp.abs(quantize.dequantize(steps, scale, axis) - kernel.astype(jnp.float32))
    assert np.all(off <= HALF * jnp.expand_dims(scale, axis))
    assert np.all(np.max(np.abs(np.asarray(steps)), axis=-1) == 127)


def test_columns_of_every_size() -> None:
    """Catches a division by zero, and a column whose step is lost beside a larger one."""
    sizes = jnp.array([0.0, 1e-37, 1e-8, 1.0, 1e37])
    steps, scale = quantize.quantize(normal(64, 5) * sizes[None])
    off = jnp.abs(quantize.dequantize(steps, scale) - normal(64, 5) * sizes[None])
    assert np.all(np.isfinite(scale)) and not np.any(steps[0])
    assert np.all(off <= HALF * scale[None])


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("lead", [(), (1, 1), (2, 3), (3, 4)])
@pytest.mark.parametrize("outputs", [(24,), (2, 24)])
def test_product_equals_that_of_the_weight(monkeypatch, backend, lead, outputs) -> None:
    """Catches scales of another column, and rows of padding that stay."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    x, (kernel, scale) = normal(*lead, 40, seed=1), quantize.quantize(normal(40, *outputs))
    wanted = np.tensordot(np.asarray(x, np.float64), quantize.dequantize(kernel, scale), 1)
    got = matmul(x, kernel, scale=scale)
    assert got.dtype == jnp.float32 and got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted, atol=1e-5, rtol=1e-5)


def test_half_precision_is_rounded_once() -> None:
    """Catches a sum that is rounded to bfloat16 before it is scaled, or a scale in bfloat16."""
    x = normal(5, 64, seed=1, dtype=jnp.bfloat16)
    kernel, scale = quantize.quantize(normal(64, 48))
    whole = np.asarray(x, np.float64) @ np.asarray(quantize.dequantize(kernel, scale), np.float64)
    got = matmul(x, kernel, scale=scale)
    assert got.dtype == jnp.bfloat16
    # Half a unit in the last of 8 bits.
    np.testing.assert_allclose(np.asarray(got, np.float64), whole, rtol=2**-8 * 1.01, atol=1e-5)
    np.testing.assert_allclose(matmul(x, kernel, jnp.float32, scale), whole, rtol=1e-4, atol=1e-4)


EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
FUSED = Layout(gate_up_fused=True, qkv_fused=True)
TARGETS = {
    "plain": (tiny_target(), PLAIN),
    "fused": (tiny_target(attention_bias=True, qk_norm=True), FUSED),
    "experts": (tiny_target(**EXPERTS), PLAIN),
    "fused experts": (tiny_target(**EXPERTS), Layout(gate_up_fused=True)),
    "tied": (tiny_target(tie_word_embeddings=True), PLAIN),
}


@pytest.mark.parametrize("tokens", [2, 30])  # experts are gathered, or go through all
@pytest.mark.parametrize("name", TARGETS)
def test_a_target_computes_with_the_weights_it_stands_for(name, tokens) -> None:
    """Catches a matrix multiplied without its scale, and experts that get each other's."""
    config, layout = TARGETS[name]
    params = quantize.quantize_params(random_params(Transformer, config, 1, layout=layout))
    eight = dataclasses.replace(layout, quantize="int8")
    found = param_shapes(Transformer, config, eight)
    shapes = {name: (x.shape, x.dtype) for name, x in found.items()}
    assert shapes == {name: (x.shape, x.dtype) for name, x in params.items()}

    @functools.partial(jax.jit, static_argnums=0)
    def logits(layout, params):
        text = jnp.arange(tokens, dtype=jnp.int32)[None]
        model = bind(Transformer, config, params, layout)
        features = model(text, text, packed_mask(jnp.zeros_like(text))).features
        return model.logits(features)

    np.testing.assert_allclose(
        logits(eight, params), logits(layout, large(params)), atol=2e-4, rtol=2e-4
    )


def _random(name: str):
    config, layout = TARGETS[name]
    return random_params(Transformer, config, 1, layout=layout)


def test_what_is_quantised() -> None:
    """Catches a router, a norm or an embedding in eight bits, and a matrix that is left out."""
    params = quantize.quantize_params(_random("fused experts"))
    floats = {name.split(".")[-1] for name, x in params.items() if x.dtype != jnp.int8}
    assert floats == {"embedding", "scale", "kernel", "kernel_scale"}
    left = [name for name in params if name.endswith("kernel") and params[name].dtype != jnp.int8]
    assert left == [f"layers.{i}.mlp.gate.kernel" for i in range(2)]
    half = cast(params, jnp.bfloat16)
    assert {str(x.dtype) for name, x in half.items() if "kernel_scale" in name} == {"float32"}
    assert half["embed_tokens.embedding"].dtype == jnp.bfloat16


_WHOLE = tiny_target()
DRAFTED = {
    "eagle": (tiny_draft(_WHOLE), PLAIN),
    "eagle with a vocabulary": (tiny_draft(_WHOLE, draft_vocab_size=20), FUSED),
    "eagle3": (tiny_eagle3(_WHOLE, fc_norm=True), PLAIN),
    "eagle3 fused": (tiny_eagle3(_WHOLE, target_hidden_size=40), FUSED),
    "medusa": (tiny_medusa(_WHOLE), PLAIN),
    "medusa tied": (tiny_medusa(_WHOLE, tie_lm_head=True, num_layers=2), FUSED),
}


@pytest.mark.parametrize("name", DRAFTED)
def test_a_draft_computes_with_the_weights_it_stands_for(name) -> None:
    """Catches a matrix of a head that is left out, or multiplied without its scale."""
    config, layout = DRAFTED[name]
    params = quantize.quantize_params(random_draft(config, 2, layout=layout).params)
    eight = dataclasses.replace(layout, quantize="int8")
    cls = registry.by_kind(config.kind).module_class()
    found = param_shapes(cls, config, eight)
    shapes = {name: (x.shape, x.dtype) for name, x in found.items()}
    assert shapes == {name: (x.shape, x.dtype) for name, x in params.items()}
    matrices = [name for name, x in params.items() if x.ndim > 1 and x.dtype != jnp.int8]
    assert not [name for name in matrices if name.endswith("kernel")]
    floats = {"embed_tokens.embedding"} if "embed_tokens.embedding" in params else set()
    assert {name for name in matrices if not name.endswith(quantize.SCALE)} == floats

    target = bind(Transformer, _WHOLE, random_params(Transformer, _WHOLE, 1))
    text = jnp.arange(6, dtype=jnp.int32)[None]

    @functools.partial(jax.jit, static_argnums=0)
    def scores(layout, params):
        draft = bind(cls, config, params, layout)
        if config.kind == "medusa":
            return draft.logits(normal(1, 6, 32), target)
        states = draft.fuse(normal(1, 6, 3 * config.feature_size if "3" in name else 32))
        mask = packed_mask(jnp.zeros_like(text))
        embedded = normal(1, 6, config.hidden_size, seed=2)
        return draft.logits(draft(embedded, states, text, mask)[0], target)

    got, wanted = scores(eight, params), scores(layout, large(params))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4, rtol=2e-4), got, wanted)


@functools.cache
def vanilla(setting: str) -> list[list[int]]:
    return texts("vanilla", setting)


def texts(method: str, setting: str, params: Params | None = None) -> list[list[int]]:
    options = SETTINGS[setting] | {"seed": decoding.SEEDS, "max_new_tokens": decoding.NEW}
    chosen = decoding.METHODS[method]
    out = generate(params or pair(), decoding.PROMPTS, method=chosen, **options)
    return decoding.lists(out.tokens)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_the_text(method, setting) -> None:
    """Catches a draft that reads the target's head without its scales, and rounding by width."""
    assert texts(method, setting) == vanilla(setting)


def test_a_draft_vocabulary_keeps_the_text() -> None:
    """Catches columns that are looked for in the eight-bit head: the draft has them as floats."""
    params = small(decoding.with_vocabulary(decoding.random_pair(), (9, 2, 4, 10)))
    assert params.drafts["eagle"].params["lm_head.kernel"].dtype == jnp.float32
    assert texts("eagle chain", "sampled", params) == vanilla("sampled")


@pytest.mark.parametrize("quantized", [False, True], ids=["float target", "int8 target"])
@pytest.mark.parametrize("method", METHODS[1:])
def test_small_drafts_keep_the_text(method, quantized) -> None:
    """Catches a head in eight bits that is taken for the target's."""
    whole = decoding.random_pair()
    params = small_drafts(decoding.with_vocabulary(whole, range(decoding.VOCAB)))
    params, whole = (small(params), small(whole)) if quantized else (params, whole)
    assert texts(method, "sampled", params) == texts("vanilla", "sampled", whole)


def test_loading_small_drafts(tiny_model) -> None:
    """Catches drafts rounded twice, one that stays as it was, and a target that changes."""
    whole = eagle_jax.load(tiny_model)
    params = eagle_jax.load(tiny_model, quantize_drafts="int8")
    assert (params.quantize, params.quantize_drafts) == (None, "int8")
    assert whole.quantize_drafts is None and set(params.drafts) == set(whole.drafts)
    jax.tree.map(np.testing.assert_array_equal, params.target, whole.target)
    half = eagle_jax.load(tiny_model, quantize_drafts="int8", dtype="bfloat16")
    vocab = whole.target_config.vocab_size
    for kind, draft in whole.drafts.items():
        expected, config = dict(draft.params), draft.config
        if kind == "eagle":  # the head, which is the target's otherwise
            expected["lm_head.kernel"] = whole.target["lm_head.kernel"]
            expected["d2t"] = jnp.zeros(vocab, jnp.int32)
            config = dataclasses.replace(config, draft_vocab_size=vocab)
        small, expected = params.drafts[kind], quantize.quantize_params(expected)
        assert small.config == config
        assert small.layout == dataclasses.replace(draft.layout, quantize="int8")
        assert small.params.keys() == expected.keys() == half.drafts[kind].params.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(small.params[name], array, err_msg=name)
            rounded = half.drafts[kind].params[name]
            if array.dtype == jnp.int8:  # of the file's own numbers
                np.testing.assert_array_equal(rounded, array, err_msg=name)
    both = eagle_jax.load(tiny_model, quantize="int8", quantize_drafts="int8")
    assert (both.quantize, both.quantize_drafts) == ("int8", "int8")


def test_loading(tiny_model) -> None:
    """Catches weights rounded twice, drafts in eight bits, and a report that does not say it."""
    whole, params = eagle_jax.load(tiny_model), eagle_jax.load(tiny_model, quantize="int8")
    assert (whole.quantize, params.quantize) == (None, "int8")
    assert params.dtype == jnp.float32
    expected = quantize.quantize_params(whole.target)
    assert params.target.keys() == expected.keys()
    for name, array in expected.items():
        assert params.target[name].dtype == array.dtype
        np.testing.assert_array_equal(params.target[name], array, err_msg=name)
    for kind, draft in whole.drafts.items():
        assert params.drafts[kind].config == draft.config
        assert params.drafts[kind].layout == draft.layout
        for name, array in draft.params.items():
            np.testing.assert_array_equal(params.drafts[kind].params[name], array)
    half = eagle_jax.load(tiny_model, quantize="int8", dtype="bfloat16")
    for name, array in half.target.items():
        kept = array.dtype in (jnp.int8, jnp.float32)
        assert kept == (name.removesuffix(quantize.SCALE) in expected and "kernel" in name)
        if kept:  # of the file's own numbers, not of those rounded to bfloat16
            np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_a_tied_head_becomes_a_matrix_of_its_own(tmp_path, monkeypatch) -> None:
    """Catches lookups in eight bits, and on accelerators a head that stays as it was."""
    folder = tiny_pair.write(tmp_path, tie_word_embeddings=True)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert "lm_head.kernel" not in eagle_jax.load(folder).target
    target = eagle_jax.load(folder, quantize="int8", dtype="float32").target
    embedding = target["embed_tokens.embedding"]
    head, scale = target["lm_head.kernel"], target["lm_head.kernel_scale"]
    assert (embedding.dtype, head.dtype) == (jnp.float32, jnp.int8)
    off = np.abs(embedding.T - quantize.dequantize(head, scale))
    assert np.all(off <= HALF * scale[None])


def test_several_devices_load_the_same(tiny_model) -> None:
    """Catches scales that lie elsewhere than their outputs, and a largest number of one part."""
    mesh = sharding.make_mesh(tensor=2, devices=jax.devices()[:2])
    alone = eagle_jax.load(tiny_model, quantize="int8")
    params = eagle_jax.load(tiny_model, quantize="int8", sharding=mesh)
    for name, array in params.target.items():
        np.testing.assert_array_equal(array, alone.target[name], err_msg=name)
        if name.endswith(f".kernel{quantize.SCALE}"):
            kernel = params.target[name.removesuffix(quantize.SCALE)]
            assert isinstance(kernel.sharding, NamedSharding)
            spec = (*kernel.sharding.spec, *[None] * kernel.ndim)[: kernel.ndim - 1]
            of_outputs = NamedSharding(mesh, P(*spec))
            assert array.sharding.is_equivalent_to(of_outputs, array.ndim), name
    up = params.target["layers.0.mlp.gate_up_proj.kernel_scale"]
    assert up.shape == (2, 48) and up.addressable_shards[0].data.shape == (2, 24)
    prompt, options = [3, 1, 4, 1, 5], {"temperature": 1.0, "max_new_tokens": 12}
    for method in ("vanilla", "eagle"):
        found = generate(params, prompt, method=method, **options).tokens
        expected = generate(alone, prompt, method="vanilla", **options).tokens
        assert found.tolist() == expected.tolist()


def test_small_drafts_on_several_devices(tiny_model) -> None:
    """Catches a draft that is cut along the axis where its inputs were before."""
    mesh = sharding.make_mesh(tensor=2, devices=jax.devices()[:2])
    alone = eagle_jax.load(tiny_model, quantize_drafts="int8")
    params = eagle_jax.load(tiny_model, quantize_drafts="int8", sharding=mesh)
    jax.tree.map(np.testing.assert_array_equal, params.drafts, alone.drafts)
    prompt, options = [3, 1, 4, 1, 5], {"temperature": 1.0, "max_new_tokens": 12}
    wanted = generate(alone, prompt, method="vanilla", **options).tokens.tolist()
    for name in ("eagle chain", "eagle3", "medusa", "speculative"):
        method = decoding.METHODS[name]  # small trees
        assert generate(params, prompt, method=method, **options).tokens.tolist() == wanted


def test_experts_on_several_devices() -> None:
    """Catches an expert that meets another's scales."""
    target = tiny_target(decoding.VOCAB, num_experts=4, num_experts_per_tok=2)
    layout = Layout(gate_up_fused=True)
    params = small(tiny_params(target, seed=3, layout=layout)).with_draft(None)
    wanted = texts("vanilla", "sampled", params)
    mesh = sharding.make_mesh(tensor=2, expert=2, devices=jax.devices()[:4])
    where = sharding.weight_shardings(mesh, params.target, stored=False)
    scale = where["layers.0.mlp.experts.down_proj.kernel_scale"]
    assert scale.shard_shape((4, 32)) == (1, 32)
    placed = dataclasses.replace(params, target=jax.device_put(params.target, where))
    assert texts("vanilla", "sampled", placed) == wanted


def test_programs_take_eight_bits() -> None:
    """Catches a float copy of the weights among a program's arguments, and bytes counted so."""
    target = tiny_target(64, hidden_size=128, intermediate_size=512)
    params = tiny_params(target).with_draft(None)
    size = {}
    for model in (params, small(params)):
        executables.forget()
        generate(model, [1, 2, 3], method="vanilla", max_new_tokens=3)
        memory = executables.executables()[-1].memory_analysis()
        size[model.quantize] = memory.argument_size_in_bytes
    saved = metrics.weight_bytes(params.target) - metrics.weight_bytes(small(params).target)
    assert size[None] - size["int8"] == pytest.approx(saved, rel=0.01)
    numbers = sum(x.size for name, x in params.target.items() if quantize.quantised(name))
    assert saved > 0.95 * 3 * numbers
    assert metrics.kv_bytes(small(params)) == metrics.kv_bytes(params)


def test_agreement() -> None:
    """Catches positions of the prompt among those compared, and a divergence the wrong way."""
    whole, eight = decoding.random_pair(), pair()
    text = [3, 1, 4, 1, 5, 9, 2, 6]
    same = agreement.compare(whole, whole, [(text, 5), (text[:5], 2)])
    assert (same.answers, same.positions, same.top1) == (2, 6, 1.0)
    assert same.kl == pytest.approx(0, abs=1e-6)
    assert same.cross_entropy == same.reference_cross_entropy
    found = agreement.compare(whole, eight, [(text, 5)])

    def probabilities(params):
        tokens = jnp.array([text], jnp.int32)
        model = bind(Transformer, params.target_config, params.target, params.layout)
        positions = jnp.arange(len(text), dtype=jnp.int32)[None]
        features = model(tokens, positions, packed_mask(jnp.zeros_like(tokens))).features
        return np.asarray(jax.nn.softmax(model.logits(features)), np.float64)[0, 4:7]

    p, q = probabilities(whole), probabilities(eight)
    assert found.kl == pytest.approx(np.mean(np.sum(p * np.log(p / q), axis=-1)), abs=1e-5)
    assert found.cross_entropy == pytest.approx(-np.mean(np.log(q[range(3), text[5:]])), abs=1e-5)
    assert found.top1 == np.mean(p.argmax(-1) == q.argmax(-1))


def test_agreement_from_the_shell(tiny_model, capsys) -> None:
    """Catches a last line that is no JSON."""
    arguments = ["--model", str(tiny_model), "--quantize", "int8", "--limit", "2"]
    agreement.main([*arguments, "--max-new-tokens", "8"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["quantize"], found["answers"]) == ("int8", 2)
    assert 0 < found["positions"] <= 16 and 0 < found["kl"] < 1


def says(text: str):
    return pytest.raises(ValueError, match=f"^[^\n]*{re.escape(text)}[^\n]*$")


def test_mistakes(tiny_model, tmp_path) -> None:
    """Catches a traceback, or wrong weights, where one line would do."""
    with says("quantize='int4': unknown; use 'int8', or None"):
        eagle_jax.load(tiny_model, quantize="int4")
    with says("quantize_drafts='int4': unknown; use 'int8', or None"):
        eagle_jax.load(tiny_model, quantize_drafts="int4")
    unknown: dict = {"quantize": "int4"}
    with says("quantize='int4': must be one of 'int8' or None"):
        EvalConfig("out", (), **unknown)
    with says("is int8, quantised already; give the model as it was before"):
        quantize.quantize_params(pair().target)
    with says("quantize='int8': quantised weights are not written"):
        hf.save_target(tmp_path / "out", pair().target_config, pair().target)
    for draft in small_drafts(pair()).drafts.values():
        with says(
            "weights are not written; give the model as it was before, load(..., quantize_dr"
        ):
            hf.save_draft(tmp_path / "out", draft.config, draft.params)
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_quantised_already(tiny_model, tmp_path) -> None:
    """Catches integers that are taken for weights and quantised again."""
    config, params = hf.load_target(tiny_model / "target")
    hf.save_target(tmp_path, config, params)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.read(path)
    name = "model.layers.0.mlp.up_proj.weight"
    safetensors.write(path, tensors | {name: np.zeros(tensors[name].shape, np.int8)})
    with says(f"{name} is int8, a quantised weight; give the model as it was before"):
        eagle_jax.load(tmp_path, quantize="int8")


def test_answers_of_two_targets_are_not_mixed(tiny_model, tmp_path) -> None:
    """Catches a file that another target's answers are added to."""
    questions = [{"messages": [{"role": "user", "content": text}]} for text in ("1+1", "2+2")]
    source, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in questions))
    options = {"method": "vanilla", "max_new_tokens": 4}
    params = eagle_jax.load(tiny_model, quantize="int8")
    assert answer_file(params, source, answers, **options)["answered"] == 2
    assert answer_file(params, source, answers, **options)["answered"] == 0
    with says("holds no answers to this input with these settings"):
        answer_file(eagle_jax.load(tiny_model), source, answers, **options)


def test_a_program_says_how_weights_lie() -> None:
    """Catches programs of two layouts that are taken for the same, and a default that is neither
    training's nor the files'."""
    assert PLAIN == Layout(gate_up_fused=False, qkv_fused=False, quantize=None)
    method, whole = decoding.METHODS["eagle chain"], decoding.random_pair()
    programs = [
        Program.of(params, method, 64)
        for params in (whole, small(whole), small_drafts(whole), small_drafts(small(whole)))
    ]
    assert len(set(programs)) == 4 and Program.of(whole, method, 64) in programs
