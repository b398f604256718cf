"""The training-time test against an explicit slow version: one conversation, one dense mask."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slow_models import VOCAB, conversations, lively, target_features, target_residuals, three_rows
from slow_models import packed as pack

from eagle_jax.config import Eagle3Config, TrainingTimeTest
from eagle_jax.drafters.eagle3 import objective as eagle3
from eagle_jax.drafters.eagle3 import ttt_attention
from eagle_jax.drafters.eagle3.objective import TrainingTimeTestObjective
from eagle_jax.models import Transformer, init_params
from eagle_jax.testing import tiny_target
from eagle_jax.train.objectives import means

TARGET_CONFIG = tiny_target(VOCAB)
TARGET = lively(init_params(Transformer, TARGET_CONFIG, 0), 0)
DRAFT = Eagle3Config(
    vocab_size=VOCAB,
    draft_vocab_size=6,
    hidden_size=TARGET_CONFIG.hidden_size,
    intermediate_size=40,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    aux_layers=(0, 1, 2),
)
TABLE = np.asarray(TARGET["embed_tokens.embedding"])
HEAD = np.asarray(TARGET["lm_head.kernel"], np.float64)
SETTINGS = TrainingTimeTest(draft=DRAFT, target="", steps=3, decay=0.7)
TOKENS = np.array([0, 2, 3, 5, 6, 8])
D2T = (TOKENS - np.arange(6)).astype(np.int32)


def objective(chunk=ttt_attention.CHUNK, draft=None, **settings):
    changed = dataclasses.replace(SETTINGS, **settings)
    if draft:
        changed = dataclasses.replace(changed, draft=dataclasses.replace(DRAFT, **draft))
    return TrainingTimeTestObjective(changed, TARGET_CONFIG, TARGET, D2T, 0.9, chunk=chunk)


def weights(task):
    return lively(task.init(0, task.frozen()), 1)


# --- The slow implementation -----------------------------------------------------------------


def rms(x, scale):
    return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale[None]


def turned(x, positions):
    """Rotary embedding of one head, [n, e]: each pair of numbers is a complex one."""
    half = x.shape[1] // 2
    angle = np.outer(positions, 10000.0 ** (-np.arange(half) / half)).astype(np.float32)
    z = jax.lax.complex(x[:, :half], x[:, half:]) * np.exp(1j * angle).astype(np.complex64)
    return jnp.concatenate([z.real, z.imag], axis=1)


def visible(n, steps):
    """[steps * n, steps * n]: row t of step j sees rows up to t of step 0, and its later ones."""
    mask = np.zeros((steps * n, steps * n), bool)
    for j in range(steps):
        for t in range(n):
            mask[j * n + t, : t + 1] = True
            for i in range(1, j + 1):
                mask[j * n + t, i * n + t] = True
    return mask


def slow_states(p, config, fused, words, steps):
    """States before the last norm [steps][n, d] of one conversation; `words[j]` embeddings."""
    n, heads, shared = len(fused), config.num_attention_heads, config.num_key_value_heads
    mask = visible(n, steps)

    def w(name):
        return p[f"midlayer.{name}"]

    state, keys, values, found = fused, [], [], []
    for j in range(steps):
        seen = jnp.concatenate(
            [
                rms(words[j], w("input_layernorm.scale")),
                rms(state, w("hidden_norm.scale")),
            ],
            axis=1,
        )
        place = np.arange(n) + j
        query, key, value = (seen @ w(f"self_attn.{x}_proj.kernel") for x in "qkv")
        cut = config.head_dim * np.arange(1, heads)
        query = [turned(x, place) for x in jnp.split(query, cut, axis=1)]
        keys.append([turned(x, place) for x in jnp.split(key, shared, axis=1)])
        values.append(jnp.split(value, shared, axis=1))
        mixed = []
        for head in range(heads):
            group = head * shared // heads
            k = jnp.concatenate([x[group] for x in keys])
            v = jnp.concatenate([x[group] for x in values])
            scores = query[head] @ k.T / np.sqrt(config.head_dim).astype(np.float32)
            allowed = mask[j * n : (j + 1) * n, : (j + 1) * n]
            mixed.append(jax.nn.softmax(jnp.where(allowed, scores, -jnp.inf), axis=1) @ v)
        state = state + jnp.concatenate(mixed, axis=1) @ w("self_attn.o_proj.kernel")
        y = rms(state, w("post_attention_layernorm.scale"))
        gate = y @ w("mlp.gate_proj.kernel")
        hidden = gate * jax.nn.sigmoid(gate) * (y @ w("mlp.up_proj.kernel"))
        state = state + hidden @ w("mlp.down_proj.kernel")
        found.append(state)
        if config.norm_output:
            state = rms(state, p["norm.scale"])
    return found


def slow_rows(kind, log_draft, target_probs):
    """Loss of every row, [n]."""
    inside = target_probs[:, TOKENS]
    share = inside / inside.sum(1, keepdims=True)
    cross = -(share * log_draft).sum(1)
    if kind == "kl":
        return cross
    rate = jnp.minimum(inside, jnp.exp(log_draft)).sum(1)
    lam = jax.lax.stop_gradient(jnp.exp(-3 * rate))
    # Total variation over the whole vocabulary, where the draft gives nothing outside its own.
    outside = np.delete(np.arange(VOCAB), TOKENS)
    gaps = jnp.abs(inside - jnp.exp(log_draft)).sum(1) + target_probs[:, outside].sum(1)
    return lam * (cross + (share * jnp.log(share)).sum(1)) + (1 - lam) * gaps / 2


def example(talk, steps, n=14):
    """One conversation in NumPy: residuals, embeddings read, labels and marked rows per step.

    Filled up to n tokens, which come after all others and are thus seen by none.
    """
    tokens = np.append(talk[0], np.zeros(n - len(talk[0]), int))
    residuals = np.stack(target_residuals(TARGET, TARGET_CONFIG, tokens)).astype(np.float32)
    logits = target_features(TARGET, TARGET_CONFIG, tokens) @ HEAD
    probs = np.exp(logits - logits.max(1, keepdims=True))
    probs = (probs / probs.sum(1, keepdims=True)).astype(np.float32)
    words = np.zeros((steps, n, TABLE.shape[1]), np.float32)
    labels, marked = np.ones((steps, n, VOCAB), np.float32), np.zeros((steps, n), bool)
    for j in range(steps):
        for t in range(n):
            words[j, t] = TABLE[tokens[t + 1 + j] if t + 1 + j < n else 0]
            if t + 2 + j < len(talk[0]):
                labels[j, t], marked[j, t] = probs[t + 1 + j], talk[1][t + 2 + j]
    return residuals, words, labels, marked


def slow_ttt(params, task, examples, size):
    """Loss, and the scores [talks, steps, n, Vd] of every row."""
    settings, draft = task.settings, task.settings.draft

    def one(residuals, words, labels):
        parts = [residuals[i] for i in draft.aux_layers]
        if draft.fc_norm:
            parts = [rms(x, params[f"fc_norm.{i}.scale"]) for i, x in enumerate(parts)]
        fused = jnp.concatenate(parts, axis=1) @ params["fc.kernel"]
        states = slow_states(params, draft, fused, words, settings.steps)
        scores = [rms(x, params["norm.scale"]) @ params["lm_head.kernel"] for x in states]
        logs = [jax.nn.log_softmax(x, axis=1) for x in scores]
        rows = [slow_rows(settings.loss, x, labels[j]) for j, x in enumerate(logs)]
        return jnp.stack(rows), jnp.stack(scores)

    residuals, words, labels, marked = examples
    losses, scores = jax.vmap(one)(residuals, words, labels)
    counted = marked & np.isin(labels.argmax(3), TOKENS)
    total = jnp.zeros(())
    for j in range(settings.steps):
        below = counted[:, j].sum() if settings.mean == "masked" else size
        total += settings.decay**j / below * jnp.where(counted[:, j], losses[:, j], 0.0).sum()
    return total, scores


def slow_counts(examples, scores):
    """[4, steps]: marked rows, rows with a label, top-1 and top-3 hits."""
    *_, labels, marked = examples
    counts = np.zeros((4, marked.shape[1]))
    for talk, j, t in zip(*np.nonzero(marked), strict=True):
        best = labels[talk, j, t].argmax()
        counts[0, j] += 1
        if best in TOKENS:
            place = list(TOKENS[np.argsort(-np.asarray(scores[talk, j, t]))]).index(best)
            counts[1:, j] += 1, place < 1, place < 3
    return counts


@functools.cache
def expected(case):
    task, talks = objective(**CASES[case]), conversations()
    size = three_rows(talks)["tokens"].size
    parts = zip(*(example(talk, task.settings.steps) for talk in talks), strict=True)
    examples = [np.stack(x) for x in parts]
    slow = jax.jit(jax.value_and_grad(lambda p: slow_ttt(p, task, examples, size), has_aux=True))
    (loss, scores), gradient = slow(weights(task))
    return loss, gradient, slow_counts(examples, scores)


def compare(case, gradients=True):
    """Loss, gradient and metrics of both; raises where they differ."""
    task, batch = objective(**CASES[case]), three_rows(conversations())
    want, slopes, (marked, rows, top1, top3) = expected(case)
    if gradients:
        run = jax.jit(jax.value_and_grad(task.loss, has_aux=True))
        (loss, sums), gradient = run(weights(task), TARGET, batch, None)
    else:
        loss, sums = jax.jit(task.loss)(weights(task), TARGET, batch, None)
        slopes, gradient = {}, {}
    np.testing.assert_allclose(loss, want, rtol=2e-5)
    for name, slope in slopes.items():
        scale = float(np.abs(slope).max())
        np.testing.assert_allclose(
            gradient[name], slope, rtol=1e-3, atol=2e-5 * scale, err_msg=name
        )
        assert scale > 0, name
    assert 0 < rows[-1] < marked[-1] and 0 < top1[0] < top3[0] < rows[0]
    values = means(sums)
    np.testing.assert_allclose(sums["count"], marked[0])
    np.testing.assert_allclose(values["loss"], want, rtol=2e-5)
    np.testing.assert_allclose(values["top1"], top1[0] / marked[0], rtol=1e-5)
    np.testing.assert_allclose(values["top3"], top3[0] / marked[0], rtol=1e-5)
    np.testing.assert_allclose(values["top1_last"], top1[-1] / marked[-1], rtol=1e-5)


# --- Tests -----------------------------------------------------------------------------------

CASES = {
    "plain": {},
    "norms": {"draft": {"norm_output": True, "fc_norm": True}, "mean": "all"},
    "lk": {"loss": "lk", "chunk": 10},
}


@pytest.mark.parametrize("case", CASES)
def test_loss_gradient_and_metrics_match_the_slow_version(case):
    """Any wrong row: attention, positions, labels, weights, packing, or a dropped gradient path."""
    compare(case)


def shifted_labels(patch):
    ahead = eagle3.Labels.ahead
    patch.setattr(eagle3.Labels, "ahead", lambda self, by: ahead(self, by - 1))


def shifted_weights(patch):
    original = eagle3.next_weights
    patch.setattr(eagle3, "next_weights", lambda batch, by: original(batch, by - 1))


def standing_positions(patch):
    step = TrainingTimeTestObjective._step

    def changed(self, j, params, frozen, state, pairs, batch):
        batch = {**batch, "positions": batch["positions"] - j}
        return step(self, j, params, frozen, state, pairs, batch)

    patch.setattr(TrainingTimeTestObjective, "_step", changed)


def no_diagonal(patch):
    attend = ttt_attention.attend
    patch.setattr(
        ttt_attention, "attend", lambda q, real, own, *rest: attend(q, real, own[-1:], *rest)
    )


def leaking_segments(patch):
    attend = ttt_attention.attend
    patch.setattr(
        ttt_attention,
        "attend",
        lambda q, real, own, segments, chunk: attend(q, real, own, 0 * segments, chunk),
    )


def no_gate(patch):
    labels = TrainingTimeTestObjective._labels

    def changed(self, features, head):
        found = labels(self, features, head)
        return dataclasses.replace(found, best=jnp.maximum(found.best, 0))

    patch.setattr(TrainingTimeTestObjective, "_labels", changed)


def deaf_sum(patch):
    """The gradient through the log-sum-exp is dropped, as jax's cuDNN attention does."""
    causal = ttt_attention.causal

    def changed(*arguments):
        both: Any = causal(*arguments)
        mixed, total = both
        return mixed, jax.lax.stop_gradient(total)

    patch.setattr(ttt_attention, "causal", changed)


BUGS = [
    shifted_labels,
    shifted_weights,
    standing_positions,
    no_diagonal,
    leaking_segments,
    no_gate,
    deaf_sum,
]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_the_comparison_sees_planted_bugs(bug, monkeypatch):
    """A comparison too loose to notice the mistakes that this code invites."""
    expected("plain")
    bug(monkeypatch)
    with pytest.raises(AssertionError, match="Mismatch"):
        compare("plain", gradients=bug is deaf_sum)


@pytest.mark.parametrize("change", [{"chunk": 1}, {"chunk": 10}, {"remat": True}], ids=str)
def test_how_it_is_computed_changes_nothing(change):
    """Rows that fill up the last chunk leak into sums, a chunk gets another one's mask, or keys
    behind a group of chunks lose what later groups gave them."""
    batch = three_rows(conversations())
    params = weights(objective())

    def run(task):
        return jax.jit(jax.value_and_grad(task.loss, has_aux=True))(params, TARGET, batch, None)

    def same(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

    jax.tree.map(same, run(dataclasses.replace(objective(), **change)), run(objective()))


def test_packing_changes_nothing():
    """Rows of one conversation read another one's tokens, keys or labels."""
    talks = conversations(1)
    task = objective(steps=3)
    loss = jax.jit(task.loss)
    together = loss(weights(task), TARGET, three_rows(talks), None)
    alone = loss(weights(task), TARGET, pack([[talk] for talk in talks]), None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), together, alone)


def test_nothing_marked_gives_zero_and_no_gradient():
    """0 / 0 in a mean over no rows, or in the labels of a padded row."""
    batch = three_rows(conversations()) | {"loss_mask": jnp.zeros((3, 24))}
    task = objective(loss="lk", steps=2)
    gradient, sums = jax.jit(jax.grad(task.loss, has_aux=True))(weights(task), TARGET, batch, None)
    assert means(sums)["loss"] == 0.0
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_no_array_of_all_pairs():
    """Scores of all queries by all keys at once, which is what runs out of memory."""
    task = objective(chunk=6, steps=2)
    batch = three_rows(conversations())
    jaxpr = jax.make_jaxpr(jax.grad(lambda *a: task.loss(*a)[0]))(
        weights(task), TARGET, batch, None
    )
    text = str(jaxpr)
    assert "f32[3,2,2,6,24]" in text  # a chunk of 6 queries, 2 x 2 heads
    assert not re.search(r"f32\[3,2,2,24,(24|25|26|48)\]", text)


def test_bfloat16_is_close_to_float32():
    """A product that overflows or a cast in the wrong place; bfloat16 has 3 digits."""
    batch = three_rows(conversations())
    task = objective(steps=2)
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (weights(task), TARGET))
    high = jax.jit(task.loss)(weights(task), TARGET, batch, None)[0]
    np.testing.assert_allclose(jax.jit(task.loss)(*low, batch, None)[0], high, rtol=0.1)


def test_flops_count_every_product():
    """A step or the draft's own head forgotten in model FLOPs."""
    one, three = (objective(steps=n).flops_per_token(100) for n in (1, 3))
    d, e, f, v = 32, 8, 40, 6
    layer = 2 * d * e * (4 + 2 + 2) + 4 * e * d + 3 * d * f
    attention = 2 * 4 * e * 100
    step = 2 * (layer + d * v) + attention
    own = 4 * 4 * e * (1 + 2)
    assert three - one == pytest.approx(3 * (2 * step + own))


def test_the_draft_itself_gives_the_same_first_step():
    """Another reading of the draft than decoding has: its own call on the fused features."""
    task = objective(steps=1)
    params = weights(task)
    [(tokens, mask)] = talks = conversations(3, (14,))
    batch = pack([talks], 14)
    draft = task._draft(params)
    residuals = target_residuals(TARGET, TARGET_CONFIG, tokens)
    fused = draft.fuse(jnp.asarray(np.concatenate(residuals, axis=-1), jnp.float32)[None])
    words = jnp.asarray(TABLE)[np.append(tokens[1:], 0)][None]
    causal = jnp.tril(jnp.ones((1, 14, 14), bool))
    state, _ = draft(words, fused, batch["positions"], causal)
    assert (draft.tokens() == TOKENS).all()
    logits = draft.logits(state)[0]
    best = (target_features(TARGET, TARGET_CONFIG, tokens) @ HEAD).argmax(1)
    hits = [TOKENS[np.argmax(logits[t])] == best[t + 1] for t in range(12) if mask[t + 2]]
    sums = jax.jit(task.loss)(params, TARGET, batch, None)[1]
    assert (float(sums["top1"]), float(sums["count"])) == (sum(hits), len(hits))


def test_a_draft_of_all_tokens_takes_one_product_for_its_labels():
    """The target's head multiplied twice, or entries taken for others."""
    task = objective(draft={"draft_vocab_size": VOCAB})
    task = dataclasses.replace(task, d2t=np.zeros(VOCAB, np.int32))
    features = jax.random.normal(jax.random.key(0), (1, 5, HEAD.shape[0]))
    head = jnp.asarray(HEAD, jnp.float32)
    labels = task._labels(features, head)
    logits = np.asarray(features, np.float64) @ HEAD
    np.testing.assert_allclose(labels.probs, jax.nn.softmax(logits, axis=-1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(labels.mass, 1.0, rtol=1e-6)
    np.testing.assert_array_equal(labels.best, logits.argmax(-1))
    assert str(jax.make_jaxpr(task._labels)(features, head)).count("dot_general") == 1


@pytest.mark.parametrize("gemma", [False, True])
def test_starts_with_the_norm_and_head_of_the_target(gemma):
    """Other rows than the draft vocabulary's, and a scale that the target adds one to."""
    task = objective()
    if gemma:
        tied = {name: x for name, x in TARGET.items() if name != "lm_head.kernel"}
        config = dataclasses.replace(TARGET_CONFIG, tie_word_embeddings=True, unit_offset_norm=True)
        task = dataclasses.replace(task, target_config=config, target=tied)
    head, scale = (TABLE.T, 1 + TARGET["norm.scale"]) if gemma else (HEAD, TARGET["norm.scale"])
    params = task.init(0, task.frozen())
    np.testing.assert_array_equal(params["lm_head.kernel"], head[:, TOKENS].astype(np.float32))
    np.testing.assert_array_equal(params["norm.scale"], scale)
    shapes = jax.eval_shape(functools.partial(task.init, 0), task.frozen())
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
