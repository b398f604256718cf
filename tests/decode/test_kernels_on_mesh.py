"""Kernels of our own over a mesh, interpreted on CPUs: each device runs them on its own parts."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eagle_jax import aot, sharding
from eagle_jax.decode import DynamicTree, Eagle, Medusa, executables, generate, static_tree
from eagle_jax.layout import Layout
from eagle_jax.models import Transformer, bind, cast, kernels, quantize
from eagle_jax.models import cache as caches
from eagle_jax.models.kernels import device
from eagle_jax.params import Draft, Params, draft_place
from eagle_jax.testing import (
    random_draft,
    random_params,
    tiny_draft,
    tiny_eagle3,
    tiny_medusa,
    tiny_target,
)

drawing = importlib.import_module("eagle_jax.decode.top_k")  # a function has that name too

VOCAB, LAYERS, WIDTH, SLOTS = 64, 2, 64, 16
SIZES = {"hidden_size": WIDTH, "intermediate_size": 96, "head_dim": 16}
LAYOUT = Layout(gate_up_fused=True, qkv_fused=True)
KERNELS = {
    "product": kernels.skinny_matmul,
    "gated": kernels.skinny_matmul,
    "add": kernels.norm,
    "split": kernels.rotary,
    "attend": kernels.attention,
    "commit": kernels.commit,
    "largest": kernels.top_k,
}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(device, "INTERPRET", True)
    executables.forget()
    yield
    executables.forget()  # other tests have their own programs


def mesh(tensor: int, devices: int) -> jax.sharding.Mesh:
    return sharding.make_mesh(tensor=tensor, devices=jax.devices()[:devices])


def normal(*shape: int, seed: int = 0, dtype=jnp.bfloat16) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def put(weights, where):
    if isinstance(where, jax.sharding.Mesh):
        where = sharding.weight_shardings(where, weights, stored=False)
    return jax.device_put(weights, where)


def watched(monkeypatch) -> dict[str, list[tuple[int, ...]]]:
    """Shapes of the first operands that each kernel gets while a program is traced."""
    seen: dict[str, list[tuple[int, ...]]] = {}

    def watch(name, own):
        def watching(*args, **more):
            first = args[0][0] if name == "commit" else args[0]
            seen.setdefault(name, []).append(first.shape)
            return own(*args, **more)

        return watching

    for name, module in KERNELS.items():
        monkeypatch.setattr(module, name, watch(name, getattr(module, name)))
    return seen


# --- A pass ------------------------------------------------------------------------------------

KINDS = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "qwen": {"attention_bias": True, "qk_norm": True},
    "gemma": {"post_norms": True, "unit_offset_norm": True, "final_logit_softcapping": 30.0},
    "int8": {},
    "three products": {},
}


@functools.cache
def target(kind: str):
    config, layout = tiny_target(VOCAB, **(SIZES | KINDS[kind])), LAYOUT
    if kind == "three products":
        layout = dataclasses.replace(layout, qkv_fused=False)
    params = random_params(Transformer, config, 3, scale=6.0, layout=layout)
    params = cast(params, jnp.bfloat16)
    if kind == "int8":
        layout = dataclasses.replace(layout, quantize="int8")
        params = quantize.quantize_params(params)
    return config, layout, params


def one_pass(kind: str, rows: int, devices: jax.sharding.Mesh | None):
    """A function of a cache: a pass after it, and the cache with two of the pass's tokens."""
    config, layout, params = target(kind)
    if devices is not None:
        params = put(params, devices)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, VOCAB, (rows, 4)), jnp.int32)
    lengths = jnp.arange(5, 5 + rows, dtype=jnp.int32)
    path = jnp.broadcast_to(jnp.asarray([[0, 2]], jnp.int32), (rows, 2))

    def run(params, cache):
        with sharding.using(devices):
            model = bind(Transformer, config, params, layout)
            positions = lengths[:, None] + jnp.arange(4, dtype=jnp.int32)[None]
            mask = jnp.broadcast_to(jnp.tril(jnp.ones((4, 4), bool))[None], (rows, 4, 4))
            output = model(tokens, positions, mask, cache=cache, lengths=lengths)
            written = caches.commit(cache, output.block, path, lengths)
            return model.logits(output.features), output.residuals, written

    cache = tuple(
        (normal(rows, 2, SLOTS, 16, seed=i), normal(rows, 2, SLOTS, 16, seed=9 + i))
        for i in range(LAYERS)
    )
    if devices is not None:
        cache = jax.device_put(cache, sharding.placed(devices, cache[0][0].shape, *caches.AXES))
    return jax.jit(run), (params, cache)


@pytest.mark.parametrize(
    ("kind", "tensor", "devices", "rows"),
    [
        *((kind, 2, 4, 2) for kind in KINDS),
        ("llama", 2, 2, 1),
        ("llama", 1, 2, 2),
        ("llama", 2, 4, 3),
    ],
)
def test_passes(monkeypatch, kind: str, tensor: int, devices: int, rows: int) -> None:
    """Catches a sum that is missing or made twice, heads and columns of another device, and a
    kernel that is left out over a mesh."""
    few = kind in ("llama", "int8")  # rows, of which attention splits the product itself
    monkeypatch.setattr(kernels.attention, "_SPLIT", 8 if few else 0)
    function, args = one_pass(kind, rows, None)
    wanted = function(*args)
    seen = watched(monkeypatch)
    function, args = one_pass(kind, rows, mesh(tensor, devices))
    found = function(*args)
    own = (rows if rows % (devices // tensor) else rows // (devices // tensor)) * 4
    assert set(seen) >= {"product", "attend", "commit"}
    assert all(shape == (own, shape[1]) for shape in seen["product"])
    assert {shape[:2] for shape in seen["attend"]} == {(own // 4, 2 // tensor)}
    assert "gated" in seen
    assert ("split" in seen) == (not few and kind not in ("qwen", "three products"))
    monkeypatch.setattr(device, "INTERPRET", False)
    function, args = one_pass(kind, rows, mesh(tensor, devices))
    by_xla = function(*args)
    for other in (wanted, by_xla):
        for got, x in zip(jax.tree.leaves(found), jax.tree.leaves(other), strict=True):
            got, x = np.asarray(got, np.float32), np.asarray(x, np.float32)
            assert np.linalg.norm(got - x) < 0.02 * np.linalg.norm(x)


@pytest.mark.parametrize("kind", ["llama", "gemma", "int8"])
def test_two_sums_a_layer(kind: str) -> None:
    """Catches weights and caches that travel, and parts of a product that are sent one by one."""
    function, args = one_pass(kind, 1, mesh(2, 2))
    text = function.lower(*args).compile().as_text()
    assert text is not None
    sent = aot.collectives(text)
    assert set(sent) == {"all-reduce"} and sent["all-reduce"][0] == 2 * LAYERS + 1
    # Of the model's dtype; CPUs add such numbers in float32.
    assert sent["all-reduce"][1] * 2**20 <= (2 * LAYERS + 1) * 4 * WIDTH * 4


# --- Texts -------------------------------------------------------------------------------------

TREE = static_tree([[0], [1], [0, 0], [0, 1]])
METHODS = {
    "eagle": Eagle(TREE),
    "eagle2": Eagle(DynamicTree(depth=3, k=4, drafted=10)),
    "eagle3": Eagle(DynamicTree(depth=3, k=4, drafted=10), head="eagle3"),
    "medusa": Medusa(TREE),
}


@functools.cache
def pair(k_heads: int) -> Params:
    config, layout, params = target("llama")
    more = {"num_attention_heads": 4, "num_key_value_heads": k_heads, "head_dim": 16}
    more["intermediate_size"] = 96
    configs = (
        tiny_draft(config, **more),
        tiny_eagle3(config, **more, draft_vocab_size=32),
        tiny_medusa(config),
    )
    drafts = {own.kind: random_draft(own, 4, layout=LAYOUT) for own in configs}
    where = mesh(2, 4)
    placed = {
        kind: Draft(
            put(cast(draft.params, jnp.bfloat16), draft_place(draft.config, where)),
            draft.config,
            LAYOUT,
        )
        for kind, draft in drafts.items()
    }
    return Params(put(params, where), placed, config, layout)


def texts(params: Params, method, rows: int) -> list[list[int]]:
    prompts = [[i * i % VOCAB for i in range(17)], [3, 9, 11]][:rows]
    options = {"max_new_tokens": 20, "temperature": 1.0, "seed": 37, "ignore_eos": True}
    return [row.tolist() for row in generate(params, prompts, method=method, **options).tokens]


@functools.cache
def vanilla(rows: int) -> list[list[int]]:
    return texts(pair(2), "vanilla", rows)


@pytest.mark.parametrize(("k_heads", "rows"), [(2, 2), (1, 1)], ids=["cut", "a whole draft"])
@pytest.mark.parametrize("name", METHODS)
def test_texts(monkeypatch, name: str, k_heads: int, rows: int) -> None:
    """Catches a cache that holds something else than the text that was committed, and a draft whose
    heads cannot be cut."""
    wanted = vanilla(rows)
    seen = watched(monkeypatch)
    assert texts(pair(k_heads), METHODS[name], rows) == wanted
    assert set(seen) == set(KERNELS)
    assert {shape[:2] for shape in seen["attend"]} == {(1, 1)}  # a row, a head


# --- Scores ------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [VOCAB, VOCAB + 1])
@pytest.mark.parametrize("k", [1, 3])
def test_best_of_parts(monkeypatch, vocab: int, k: int) -> None:
    """Catches an index that misses its device's offset, ties that the wrong device wins, and shares
    of a part instead of the whole."""
    monkeypatch.setattr(drawing, "_CHUNK", 4)  # so that this vocabulary is worth a search by parts
    scores = np.random.default_rng(0).integers(0, 9, (4, 3, vocab)).astype(np.float32)
    scores[0, 0], scores[1, 1, : VOCAB // 2] = -np.inf, -np.inf
    values, index = map(np.asarray, jax.lax.top_k(scores, k))
    share = jax.nn.log_softmax(scores, axis=-1)
    share = np.nan_to_num(np.take_along_axis(np.asarray(share), index, -1), nan=-np.inf)
    for devices in (mesh(4, 8), mesh(2, 2), mesh(1, 8)):
        seen = watched(monkeypatch)

        @jax.jit
        def best(x, devices=devices):
            with sharding.using(devices):
                x = sharding.constrain(x, "batch", None, "vocab")
                return drawing.top_k(x, k), drawing.likeliest(x, k), drawing.argmax(x)

        top, (log, places), first = best(sharding.put(devices, scores))
        assert len(seen["largest"]) == 3
        np.testing.assert_array_equal(top[0], values)
        np.testing.assert_array_equal(top[1], index)
        np.testing.assert_array_equal(places, index)
        np.testing.assert_array_equal(first, index[..., 0])
        np.testing.assert_allclose(log, share, atol=1e-5)


@pytest.mark.parametrize("interpreted", [True, False])
def test_candidates_stay_where_they_are(monkeypatch, interpreted: bool) -> None:
    """Catches k x k candidates of a tree, which every device has, cut as a vocabulary is."""
    monkeypatch.setattr(device, "INTERPRET", interpreted)
    devices = mesh(2, 2)
    scores = np.random.default_rng(0).normal(size=(1, 100)).astype(np.float32)

    def best(x):
        with sharding.using(devices):
            return drawing.top_k(x, 10)

    args = sharding.put(devices, scores)
    text = jax.jit(best).lower(args).compile().as_text()
    assert text is not None and not aot.collectives(text)
    np.testing.assert_array_equal(jax.jit(best)(args)[1], np.argsort(-scores)[:, :10])
