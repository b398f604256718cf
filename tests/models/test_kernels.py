"""Kernels of our own, interpreted on the CPU, against XLA's way."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from eagle_jax.decode import chain
from eagle_jax.layout import Layout
from eagle_jax.models import Transformer, bind, cast, init_params, kernels, quantize
from eagle_jax.models import cache as caches
from eagle_jax.models.attention import kernel_attention, two_segment_attention
from eagle_jax.models.kernels import device
from eagle_jax.models.linear import Parts, RMSNorm, join, matmul
from eagle_jax.models.rotary import angles, rotary
from eagle_jax.testing import tiny_target

sampling = importlib.import_module("eagle_jax.decode.top_k")  # a function has that name too

BFLOAT16 = jnp.bfloat16


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr(device, "INTERPRET", True)


def normal(*shape: int, seed: int = 0, dtype=BFLOAT16) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def exact(x: jax.Array) -> np.ndarray:
    return np.asarray(x, np.float64)


# --- Products ----------------------------------------------------------------------------------


@pytest.mark.parametrize("quantized", [False, True], ids=["bfloat16", "int8"])
@pytest.mark.parametrize(("width", "columns"), [(256, 96), (704, 128), (64, 48), (48, 2048)])
@pytest.mark.parametrize("rows", [1, 3, 16, 17, 60])
def test_products(interpreted, rows: int, width: int, columns: int, quantized: bool) -> None:
    """Catches steps, parts and columns that are skipped or counted twice."""
    x, kernel, scale = normal(rows, width), normal(width, columns, seed=1), None
    whole = exact(kernel)
    if quantized:
        kernel, scale = quantize.quantize(kernel.astype(jnp.float32))
        whole = exact(quantize.dequantize(kernel, scale))
    assert kernels.skinny_matmul.fits(x, kernel)
    got = kernels.skinny_matmul.product(x, kernel, scale)
    assert got.dtype == jnp.float32 and got.shape[1:] == (rows, columns)
    np.testing.assert_allclose(got.sum(axis=0), exact(x) @ whole, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_parts_of_a_sum(interpreted, parts: int) -> None:
    x, kernel = normal(5, 512), normal(512, 64, seed=1)
    cut = kernels.skinny_matmul.Tile(32, 64, parts)
    got = kernels.skinny_matmul.product(x, kernel, None, cut)
    assert len(got) == parts
    np.testing.assert_allclose(got.sum(axis=0), exact(x) @ exact(kernel), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("quantized", [False, True], ids=["bfloat16", "int8"])
@pytest.mark.parametrize("rows", [1, 60])
def test_gated(interpreted, rows: int, quantized: bool) -> None:
    x, kernel = normal(rows, 128), normal(128, 2, 128 * 160, seed=1) * jnp.asarray(0.1, BFLOAT16)
    whole, scale = exact(kernel), None
    if quantized:
        kernel, scale = quantize.quantize(kernel.astype(jnp.float32))
        whole = exact(quantize.dequantize(kernel, scale))
    assert kernels.skinny_matmul.gates(x, kernel)
    gate, up = np.einsum("ni,igo->gno", exact(x), whole)
    got = exact(kernels.skinny_matmul.gated(x, kernel, scale))
    np.testing.assert_allclose(got, gate / (1 + np.exp(-gate)) * up, rtol=0.02, atol=0.02)
    assert not kernels.skinny_matmul.gates(
        x, normal(128, 2, 24)
    )  # fewer than a tensor core multiplies
    assert not kernels.skinny_matmul.gates(x.astype(jnp.float32), kernel)


@pytest.mark.parametrize("rows", [1, 10, 60])
@pytest.mark.parametrize("itemsize", [1, 2])
@pytest.mark.parametrize(("width", "f"), [(4096, 11008), (2048, 5632), (2048, 2816), (512, 1408)])
def test_gates_of_any_model_are_one_launch(monkeypatch, rows, itemsize, width, f) -> None:
    """Catches matrices so small that a product is cut in parts, for which `gated` gave up."""
    monkeypatch.setattr(device, "usable", lambda *x: True)
    found = []

    def look(x, kernel):
        assert kernels.skinny_matmul.gates(x, kernel)
        found.append(kernels.skinny_matmul._of_gates(x, kernel))

    shapes = jax.ShapeDtypeStruct((rows, width), BFLOAT16), (width, 2, f)
    jax.eval_shape(
        look, shapes[0], jax.ShapeDtypeStruct(shapes[1], (jnp.int8, BFLOAT16)[itemsize - 1])
    )
    (cut,) = found
    assert cut.parts == 1 and f % cut.columns == 0 and width % cut.step == 0
    assert f // cut.columns >= 80 or cut.columns <= 32


@pytest.mark.parametrize(
    ("rows", "columns", "step"), [(1, 64, 128), (16, 64, 128), (32, 64, 128), (60, 32, 64)]
)
def test_cuts_of_narrow_gates(rows: int, columns: int, step: int) -> None:
    """Those of a sweep at 2048 x 5632, also for what each of two devices has of 8B; wider ones and
    int8 are cut as every product is."""
    tile = kernels.skinny_matmul.gated_tile
    for width, f in ((2048, 5632), (4096, 7168)):
        cut = tile(rows, width, f, 2)
        assert cut is not None and (cut.columns, cut.step, cut.parts) == (columns, step, 1)
    for width, f, itemsize in ((4096, 11008, 2), (2048, 5632, 1)):
        cut, whole = (
            tile(rows, width, f, itemsize),
            kernels.skinny_matmul.tile(rows, width, 2 * f, itemsize),
        )
        assert cut is not None and whole is not None
        assert (2 * cut.columns, cut.step) == (whole.columns, whole.step)


def test_cuts_of_a_7b_model() -> None:
    """Every matrix makes enough programs for 132 multiprocessors, and no sliver of a step."""
    for rows in (1, 10, 60):
        for itemsize in (1, 2):
            for width, columns in ((4096, 4096), (4096, 22016), (11008, 4096), (4096, 32000)):
                cut = kernels.skinny_matmul.tile(rows, width, columns, itemsize)
                assert cut is not None and width % (cut.step * cut.parts) == 0
                assert cut.step == (128 if (rows <= 16 and itemsize == 1) else 64)
                assert columns // cut.columns * cut.parts >= 120


def test_matmul_chooses_the_kernel(interpreted, monkeypatch) -> None:
    """Catches a kernel that is never chosen, and one chosen where it may not be."""
    calls = []
    product = kernels.skinny_matmul.product
    monkeypatch.setattr(
        kernels.skinny_matmul, "product", lambda *a, **k: calls.append(a) or product(*a, **k)
    )
    x, kernel = normal(2, 3, 64), normal(64, 2, 48, seed=1)
    got = matmul(x, kernel, jnp.float32)
    assert len(calls) == 1 and got.shape == (2, 3, 2, 48)
    np.testing.assert_allclose(
        got, np.einsum("bti,igo->btgo", exact(x), exact(kernel)), atol=1e-3, rtol=1e-4
    )
    quantized, scale = quantize.quantize(kernel.astype(jnp.float32))
    got = matmul(x, quantized, scale=scale)
    assert len(calls) == 2
    np.testing.assert_allclose(exact(got), exact(quantize.product(x, quantized, scale)), rtol=0.01)
    embedding = normal(48, 64, seed=2)
    got = matmul(x, embedding, jnp.float32, turned=True)
    assert len(calls) == 3 and got.shape == (2, 3, 48)
    np.testing.assert_allclose(got, exact(x) @ exact(embedding).T, atol=1e-3, rtol=1e-4)
    for other, matrix in (
        (x.astype(jnp.float32), kernel.astype(jnp.float32)),  # whose bits are sacred
        (normal(100, 64), kernel),  # many rows
        (x, normal(64, 50)),  # no whole columns
    ):
        matmul(other, matrix)
    assert len(calls) == 3


@pytest.mark.parametrize("lead", [(1, 1), (2, 3)])
def test_a_turned_kernel_by_xla(monkeypatch, lead) -> None:
    """Catches the row that is put beside a single one on GPUs, and outputs of another matrix."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    x, kernel = normal(*lead, 64), normal(2, 48, 64, seed=1)
    got = matmul(x, kernel, jnp.float32, turned=True)
    assert got.shape == (*lead, 2, 48)
    wanted = np.einsum("bti,goi->btgo", exact(x), exact(kernel))
    np.testing.assert_allclose(got, wanted, atol=1e-3, rtol=1e-4)


def test_not_on_this_device() -> None:
    assert not device.usable(normal(1)) and not device.expected(normal(1).dtype)


# --- The residual stream, queries and keys -----------------------------------------------------


@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize(("n", "d", "count"), [(1, 48, 1), (5, 64, 4)])
def test_norm(interpreted, n: int, d: int, count: int, unit_offset: bool) -> None:
    x, parts = normal(1, n, d), normal(count, n, d, seed=1, dtype=jnp.float32)
    module = RMSNorm(d, 1e-5, unit_offset=unit_offset, rngs=nnx.Rngs(0))
    module.scale = nnx.Param(normal(d, seed=2))
    joined, normed = join(x, Parts(parts, x.shape, x.dtype), module)
    total = x + jnp.sum(parts, axis=0).astype(BFLOAT16)[None]
    np.testing.assert_array_equal(joined, total)
    np.testing.assert_allclose(exact(normed), exact(module(total)), rtol=0.02, atol=1e-6)


@pytest.mark.parametrize(("b", "t"), [(1, 1), (2, 5)])
@pytest.mark.parametrize(("k", "g"), [(2, 1), (2, 4), (1, 3)])
def test_rotary(interpreted, b: int, t: int, k: int, g: int) -> None:
    e, count = 16, 3
    parts = normal(count, b * t, k * (g + 2) * e, dtype=jnp.float32)
    positions = jnp.asarray(np.random.default_rng(1).integers(0, 300, (b, t)))
    turn = angles(positions, e // 2, 1e4, None)
    got = kernels.rotary.split(parts, *turn, (k, g + 2, e), jnp.dtype(BFLOAT16))
    both = jnp.sum(parts, axis=0).astype(BFLOAT16).reshape(b, t, k, g + 2, e)
    query = rotary(both[:, :, :, :g].reshape(b, t, k * g, e), positions, 1e4)
    keys = rotary(both[:, :, :, g], positions, 1e4)
    wanted = (
        query.reshape(b, t, k, g, e).transpose(0, 2, 1, 3, 4).reshape(b, k, t * g, e),
        keys.transpose(0, 2, 1, 3),
        both[:, :, :, g + 1].transpose(0, 2, 1, 3),
    )
    for ours, theirs in zip(got, wanted, strict=True):
        np.testing.assert_allclose(exact(ours), exact(theirs), rtol=2**-7, atol=1e-3)


# --- Attention ---------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 5, 40], ids=lambda w: f"window {w}")
@pytest.mark.parametrize("softcap", [None, 3.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("tokens", [1, 5, 21])
@pytest.mark.parametrize("lengths", [(0, 128), (3, 77), (64, 65)], ids=str)
def test_attention(interpreted, monkeypatch, lengths, tokens, softcap, window) -> None:
    """Whatever is used of the cache: nothing, all, parts of a step; rows beyond a tile."""
    b, h, k, e, slots = 2, 8, 2, 16, 128
    query = normal(b, tokens, h, e)
    block = (normal(b, k, tokens, e, seed=1), normal(b, k, tokens, e, seed=2))
    prefix = (normal(b, k, slots, e, seed=3), normal(b, k, slots, e, seed=4))
    mask = np.random.default_rng(5).random((b, tokens, tokens)) < 0.5
    mask = jnp.asarray(mask | np.eye(tokens, dtype=bool))
    length = jnp.asarray(lengths)
    bounds = {"softcap": softcap, "scale": 0.4}
    if window is not None:
        bounds["oldest"] = length[:, None] + jnp.arange(tokens)[None] - window
    calls = []
    attend = kernels.attention.attend
    monkeypatch.setattr(kernels.attention, "attend", lambda *a: calls.append(1) or attend(*a))
    got = two_segment_attention(query, block, mask, prefix, length, **bounds)
    monkeypatch.setattr(device, "INTERPRET", False)
    wanted = two_segment_attention(query, block, mask, prefix, length, **bounds)
    assert len(calls) == 1 and got.dtype == BFLOAT16
    np.testing.assert_allclose(exact(got), exact(wanted), atol=0.03, rtol=0.02)


@pytest.mark.parametrize("parts", [1, 3, 8])
@pytest.mark.parametrize("rows", [16, 64])
def test_cuts_of_attention(interpreted, parts: int, rows: int) -> None:
    b, k, q, e, slots, fresh = 1, 2, 40, 32, 96, 20
    query = normal(b, k, q, e) * jnp.asarray(0.2, BFLOAT16)
    block = (normal(b, k, fresh, e, seed=1), normal(b, k, fresh, e, seed=2))
    prefix = (normal(b, k, slots, e, seed=3), normal(b, k, slots, e, seed=4))
    mask = jnp.ones((b, q, fresh), bool)
    run = functools.partial(
        kernels.attention.attend, query, block, mask, prefix, jnp.array([50]), None, q, 1.0, None
    )
    keys, values = (
        np.concatenate([exact(old)[:, :, :50], exact(new)], axis=2)
        for old, new in zip(prefix, block, strict=True)
    )
    weights = np.exp(exact(query) @ keys.swapaxes(2, 3))
    wanted = weights / weights.sum(axis=-1, keepdims=True) @ values
    cut = dataclasses.replace(kernels.attention.tile(q, slots, k), rows=rows, parts=parts)
    np.testing.assert_allclose(exact(run(cut)[0]), wanted.swapaxes(1, 2), atol=0.02)


@pytest.mark.parametrize("window", [None, 5], ids=lambda w: f"window {w}")
@pytest.mark.parametrize(
    ("b", "t", "k", "g"), [(1, 1, 2, 1), (2, 1, 2, 4), (2, 4, 2, 2), (1, 8, 2, 1)]
)
def test_attention_that_splits_a_product(interpreted, b, t, k, g, window) -> None:
    """Catches heads, tokens and halves that are mixed up, and a block that is not written."""
    e, count, slots = 16, 3, 64
    parts = normal(count, b * t, k * (g + 2) * e, dtype=jnp.float32) / count
    length = jnp.asarray([17, 0][:b])
    places = length[:, None] + jnp.arange(t)[None]
    turn, heads = angles(places, e // 2, 1e4, None), (k, g + 2, e)
    joined = kernels.attention.Joined(parts, *turn, heads, jnp.dtype(BFLOAT16))
    prefix = (normal(b, k, slots, e, seed=3), normal(b, k, slots, e, seed=4))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((t, t), bool)), (b, t, t))
    oldest = None if window is None else places - window
    assert kernels.attention.splits(joined, prefix)
    got = kernel_attention(joined, None, mask, prefix, length, oldest=oldest)
    query, *block = kernels.rotary.split(parts, *turn, heads, jnp.dtype(BFLOAT16))
    query = query.reshape(b, k, t, g, e).transpose(0, 2, 1, 3, 4).reshape(b, t, k * g, e)
    mixed = two_segment_attention(query, tuple(block), mask, prefix, length, oldest=oldest)
    for ours, theirs in zip(jax.tree.leaves(got), (mixed, *block), strict=True):
        np.testing.assert_allclose(exact(ours), exact(theirs), atol=2**-7, rtol=2**-7)
    many = dataclasses.replace(joined, cos=jnp.zeros((b, 9, e // 2)))
    assert not kernels.attention.splits(many, prefix)


# --- Caches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2, 100])
@pytest.mark.parametrize("n", [1, 7])
def test_commit(interpreted, monkeypatch, n: int, layers: int) -> None:
    b, k, slots, e, fresh = 2, 2, 32, 16, 9
    pairs = range(layers)
    cache = tuple(
        (normal(b, k, slots, e, seed=i), normal(b, k, slots, e, seed=1000 + i)) for i in pairs
    )
    block = tuple(
        (normal(b, k, fresh, e, seed=i + 1), normal(b, k, fresh, e, seed=i + 2)) for i in pairs
    )
    path = jnp.asarray(np.random.default_rng(0).integers(0, fresh, (b, n)), jnp.int32)
    start = jnp.array([0, slots - n], jnp.int32)
    calls = []
    commit = kernels.commit.commit
    monkeypatch.setattr(kernels.commit, "commit", lambda *a: calls.append(1) or commit(*a))
    got = caches.commit(cache, block, path, start)
    monkeypatch.setattr(device, "INTERPRET", False)
    wanted = caches.commit(cache, block, path, start)
    assert calls == [1]
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


@pytest.mark.parametrize(("rows", "fresh", "launches"), [(2, 7, 1), (1, 7, 1), (2, 80, 0)])
def test_write(interpreted, monkeypatch, rows: int, fresh: int, launches: int) -> None:
    """Catches slots beside those of the block, and a block too long for a program."""
    k, slots, e = 2, 96, 16
    cache = ((normal(rows, k, slots, e), normal(rows, k, slots, e, seed=1)),)
    block = ((normal(rows, k, fresh, e, seed=2), normal(rows, k, fresh, e, seed=3)),)
    start = jnp.array([3, slots - fresh][:rows], jnp.int32)
    calls, commit = [], kernels.commit.commit
    monkeypatch.setattr(kernels.commit, "commit", lambda *a: calls.append(1) or commit(*a))
    got = caches.write(cache, block, start)
    monkeypatch.setattr(device, "INTERPRET", False)
    jax.tree.map(np.testing.assert_array_equal, got, caches.write(cache, block, start))
    assert len(calls) == launches


# --- The largest -------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 10])
@pytest.mark.parametrize("vocab", [10, 100, 1024, 5000])
def test_largest(interpreted, vocab: int, k: int) -> None:
    """Values that stand more than once: the lowest index wins, within and across chunks."""
    rng = np.random.default_rng(vocab)
    scores = jnp.asarray(rng.integers(-20, 20, (4, vocab)), jnp.float32)
    scores = scores.at[1].set(-jnp.inf).at[2, ::2].set(-jnp.inf).at[3].multiply(1e3)
    best, index, whole = kernels.top_k.largest(scores, k)
    wanted, places = jax.lax.top_k(scores, k)
    np.testing.assert_array_equal(best, wanted)
    np.testing.assert_array_equal(index, places)
    np.testing.assert_allclose(whole, jax.nn.logsumexp(scores, axis=-1), rtol=1e-6)


def test_no_number_is_never_among_the_largest(interpreted) -> None:
    scores = jnp.array([[jnp.nan, 1.0, jnp.nan, 3.0, jnp.inf]], jnp.float32)
    best, index, _ = kernels.top_k.largest(scores, 3)
    np.testing.assert_array_equal(best[0], [jnp.inf, 3.0, 1.0])
    np.testing.assert_array_equal(index[0], [4, 3, 1])


def test_who_asks_for_the_largest(interpreted, monkeypatch) -> None:
    calls, largest = [], kernels.top_k.largest
    monkeypatch.setattr(kernels.top_k, "largest", lambda *a: calls.append(1) or largest(*a))
    scores = normal(2, 3, 3000, dtype=jnp.float32)
    found, shares = sampling.top_k(scores, 10), sampling.likeliest(scores, 10)
    equal = jnp.zeros((2, 3, 3000)).at[..., 7::500].set(1.0)
    first, drawn = sampling.argmax(equal), sampling.argmax(scores)
    assert len(calls) == 4
    monkeypatch.setattr(device, "INTERPRET", False)
    assert np.all(first == 7) and drawn.dtype == sampling.argmax(scores).dtype
    np.testing.assert_array_equal(drawn, sampling.argmax(scores))
    jax.tree.map(np.testing.assert_array_equal, found, sampling.top_k(scores, 10))
    wanted = sampling.likeliest(scores, 10)
    np.testing.assert_array_equal(shares[1], wanted[1])
    np.testing.assert_allclose(shares[0], wanted[0], rtol=1e-6)


# --- Together ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("joined", "changes"),
    [(True, {}), (False, {}), (True, {"int8": True}), (True, {"tie_word_embeddings": True})],
    ids=["bfloat16", "q, k and v apart", "int8", "tied head"],
)
@pytest.mark.parametrize("t", [2, 5])
def test_a_pass_with_all_of_them(interpreted, monkeypatch, t: int, joined: bool, changes) -> None:
    """Catches heads, tokens and layers that are mixed up between one kernel and the next."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    tied = changes.get("tie_word_embeddings", False)
    config = tiny_target(64, tie_word_embeddings=tied, **sizes)
    layout = Layout(gate_up_fused=True, qkv_fused=joined)
    params = cast(init_params(Transformer, config, 0, layout), BFLOAT16)
    rng = np.random.default_rng(0)
    params = {
        name: jnp.asarray(rng.normal(size=x.shape) * (0.1 if x.ndim > 1 else 1.0), x.dtype)
        for name, x in params.items()
    }
    if "int8" in changes:
        layout = dataclasses.replace(layout, quantize="int8")
        params = quantize.quantize_params(params)
    b, slots, lengths = 2, 48, jnp.array([7, 33])
    cache = tuple(
        (normal(b, 2, slots, 16, seed=i), normal(b, 2, slots, 16, seed=i + 9)) for i in range(2)
    )
    tokens = jnp.asarray(rng.integers(0, 64, (b, t)))
    shape = chain(t - 1).shape(b)
    used = []
    of = (
        kernels.skinny_matmul,
        kernels.skinny_matmul,
        kernels.norm,
        kernels.rotary,
        kernels.attention,
    )
    for kernel, at in zip(of, ("product", "gated", "add", "split", "attend"), strict=True):
        own = getattr(kernel, at)
        monkeypatch.setattr(
            kernel, at, lambda *a, own=own, at=at, **k: used.append(at) or own(*a, **k)
        )

    def run():
        model = bind(Transformer, config, params, layout)
        places = lengths[:, None] + shape.depth
        output = model(tokens, places, shape.ancestors, cache=cache, lengths=lengths)
        return model.logits(output.features), output.residuals, output.block

    got = run()
    # Of a layer: one product for q, k and v or three, one for o and one for down.
    products = 2 * (3 if joined else 5) + 1
    assert {name: used.count(name) for name in set(used)} == {
        **{"product": products, "gated": 2},
        **({"split": 2} if joined and t == 5 else {}),  # of few rows attention does it itself
        "add": 4,
        "attend": 2,
    }
    monkeypatch.setattr(device, "INTERPRET", False)
    wanted = run()
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        error = np.linalg.norm(exact(ours) - exact(theirs)) / np.linalg.norm(exact(theirs))
        assert error < 0.02
