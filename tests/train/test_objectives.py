"""Objectives against a slow NumPy implementation that sees one conversation at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slow_models import (
    VOCAB,
    conversations,
    decoder_layer,
    lively,
    packed,
    softmax,
    target_features,
    three_rows,
)

from eagle_jax.config import EagleConfig, FeatureRegression
from eagle_jax.drafters.eagle.module import EagleDraft
from eagle_jax.drafters.eagle.objective import FeatureRegressionObjective
from eagle_jax.models import Transformer, init_params
from eagle_jax.testing import tiny_draft, tiny_target
from eagle_jax.train.objectives import NextTokenObjective, means
from eagle_jax.train.objectives.base import project, rank

TARGET_CONFIG = tiny_target(VOCAB)
DRAFT_CONFIG = tiny_draft(TARGET_CONFIG)


TARGET = lively(init_params(Transformer, TARGET_CONFIG, 0), 0)
DRAFT = lively(init_params(EagleDraft, DRAFT_CONFIG, 0), 1)
# It leans on the last feature, so that it agrees with the target now and then.
WIDTH = TARGET_CONFIG.hidden_size
DRAFT["fc.kernel"] = DRAFT["fc.kernel"].at[WIDTH:].add(1.5 * jnp.eye(WIDTH))
SETTINGS = FeatureRegression(
    draft=DRAFT_CONFIG, target="", feature_weight=0.7, token_weight=0.3, noise=0.1
)
NEXT = NextTokenObjective(TARGET_CONFIG)
FEATURES = FeatureRegressionObjective(SETTINGS, TARGET_CONFIG, TARGET)


# --- The slow implementation -----------------------------------------------------------------


def draft_features(p, config: EagleConfig, embeddings, features):
    x = np.concatenate([embeddings, features], axis=-1) @ np.asarray(p["fc.kernel"], np.float64)
    x = x + np.asarray(p["fc.bias"], np.float64)
    return decoder_layer(p, "layers.0", config, x, input_norm=False)


def slow_next_token(conversations):
    head = np.asarray(TARGET["lm_head.kernel"], np.float64)
    sums = {"loss": 0.0, "top1": 0.0, "count": 0.0}
    for tokens, mask in conversations:
        probs = softmax(target_features(TARGET, TARGET_CONFIG, tokens) @ head)
        for label in range(1, len(tokens)):
            if mask[label]:
                row = probs[label - 1]
                sums["loss"] -= np.log(row[tokens[label]])
                sums["top1"] += row.argmax() == tokens[label]
                sums["count"] += 1
    return sums


def slow_feature_regression(conversations, kind="kl"):
    head = np.asarray(TARGET["lm_head.kernel"], np.float64)
    table = np.asarray(TARGET["embed_tokens.embedding"], np.float64)
    names = ("feature_loss", "token_loss", "top1", "top3", "count")
    sums = dict.fromkeys(names, 0.0)
    for tokens, mask in conversations:
        if len(tokens) < 3:
            continue
        real = target_features(TARGET, TARGET_CONFIG, tokens)
        # n tokens make n - 1 pairs (feature, next token's embedding).
        predicted = draft_features(DRAFT, DRAFT_CONFIG, table[tokens[1:]], real[:-1])
        for drafted in range(2, len(tokens)):  # the token whose distribution is learnt
            if not mask[drafted]:
                continue
            want, got = real[drafted - 1], predicted[drafted - 2]
            gap = np.abs(want - got)
            sums["feature_loss"] += np.where(gap < 1, gap**2 / 2, gap - 0.5).mean()
            target_probs, draft_probs = softmax(want @ head), softmax(got @ head)
            cross = -(target_probs * np.log(draft_probs)).sum()
            if kind == "lk":
                divergence = cross + (target_probs * np.log(target_probs)).sum()
                rate = np.minimum(target_probs, draft_probs).sum()
                share = np.exp(-3.0 * rate)
                cross = share * divergence + (1 - share) * (1 - rate)
            sums["token_loss"] += cross
            order = np.argsort(-draft_probs, kind="stable")
            sums["top1"] += order[0] == target_probs.argmax()
            sums["top3"] += target_probs.argmax() in order[:3]
            sums["count"] += 1
    return sums


# --- Tests -----------------------------------------------------------------------------------


def test_next_token_matches_the_slow_implementation():
    talks = conversations()
    loss, sums = jax.jit(NEXT.loss)(TARGET, {}, three_rows(talks), None)
    want = slow_next_token(talks)
    for name, value in want.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(loss, want["loss"] / want["count"], rtol=1e-5)


@pytest.mark.parametrize("kind", ["kl", "lk"])
def test_feature_regression_matches_the_slow_implementation(kind):
    talks = conversations()
    settings = dataclasses.replace(FEATURES.settings, loss=kind)
    task = dataclasses.replace(FEATURES, settings=settings)
    loss, sums = jax.jit(task.loss)(DRAFT, TARGET, three_rows(talks), None)
    want = slow_feature_regression(talks, kind)
    assert 0 < want["top1"] <= want["top3"] < want["count"]
    for name, value in want.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-5, err_msg=name)
    combined = 0.7 * want["feature_loss"] + 0.3 * want["token_loss"]
    np.testing.assert_allclose(loss, combined / want["count"], rtol=1e-5)


@pytest.mark.parametrize("objective", [NEXT, FEATURES], ids=["next", "features"])
def test_packing_changes_nothing(objective):
    talks = conversations(1)
    params = TARGET if objective is NEXT else DRAFT
    loss = jax.jit(objective.loss)
    together = loss(params, objective.frozen(), three_rows(talks), None)
    alone = loss(params, objective.frozen(), packed([[talk] for talk in talks]), None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), together, alone)


def test_nothing_marked_gives_zero_and_no_gradient():
    batch = three_rows(conversations()) | {"loss_mask": jnp.zeros((3, 24))}
    gradient, sums = jax.jit(jax.grad(FEATURES.loss, has_aux=True))(DRAFT, TARGET, batch, None)
    assert means(sums)["loss"] == 0.0
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_noise_is_on_the_inputs_only_and_fresh_per_key():
    batch = three_rows(conversations())
    loss = jax.jit(FEATURES.loss)
    clean = loss(DRAFT, TARGET, batch, None)[0]
    noisy = [loss(DRAFT, TARGET, batch, jax.random.key(i))[0] for i in (0, 0, 1)]
    assert noisy[0] == noisy[1] != noisy[2] and noisy[0] != clean
    none = dataclasses.replace(FEATURES, settings=dataclasses.replace(SETTINGS, noise=0.0))
    np.testing.assert_allclose(
        jax.jit(none.loss)(DRAFT, TARGET, batch, jax.random.key(0))[0], clean
    )
    # Noise of any size leaves the regression's goal alone: a draft that ignores features.
    deaf = DRAFT | {"fc.kernel": DRAFT["fc.kernel"].at[WIDTH:].set(0.0)}
    loud = dataclasses.replace(FEATURES, settings=dataclasses.replace(SETTINGS, noise=9.0))
    with_noise = jax.jit(loud.loss)(deaf, TARGET, batch, jax.random.key(0))[0]
    np.testing.assert_allclose(with_noise, loss(deaf, TARGET, batch, None)[0], rtol=1e-6)


@pytest.mark.parametrize("objective", [NEXT, FEATURES], ids=["next", "features"])
def test_gradient_step_lowers_the_loss_and_remat_agrees(objective):
    batch = three_rows(conversations())
    params = objective.init(3, objective.frozen())
    saving = dataclasses.replace(objective, remat=True)

    def value_and_grad(objective):
        def loss(params):
            return objective.loss(params, objective.frozen(), batch, None)[0]

        return jax.jit(jax.value_and_grad(loss))

    before, gradient = value_and_grad(objective)(params)
    lower = jax.tree.map(lambda x, g: x - 1e-3 * g, params, gradient)
    assert value_and_grad(objective)(lower)[0] < before
    _, same = value_and_grad(saving)(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradient, same)


def test_rank_breaks_ties_by_index():
    logits = jnp.asarray(np.random.default_rng(0).integers(0, 4, (2, 5, 9)), jnp.float32)
    order = np.argsort(-np.asarray(logits), axis=-1, kind="stable")
    for place in range(9):
        assert (rank(logits, jnp.asarray(order[..., place], jnp.int32)) == place).all()


def test_projection_has_the_plain_gradient():
    x, kernel, goal = (
        jax.random.normal(jax.random.key(i), shape)
        for i, shape in enumerate([(2, 3, 4), (4, 7), (2, 3, 7)])
    )
    ours = jax.grad(lambda *a: jnp.sum(project(*a) * goal), (0, 1))(x, kernel)
    plain = jax.grad(lambda x, k: jnp.sum(x @ k * goal), (0, 1))(x, kernel)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ours, plain)


def test_flops_count_every_matrix_once():
    config = TARGET_CONFIG
    matrices = sum(x.size for n, x in TARGET.items() if x.ndim == 2 and "embed" not in n)
    attention = 2 * 2 * config.num_attention_heads * config.head_dim * 100
    assert NEXT.flops_per_token(100) == 3 * (2 * matrices + attention)
    tied = dataclasses.replace(config, tie_word_embeddings=True)
    assert NextTokenObjective(tied).flops_per_token(100) == NEXT.flops_per_token(100)
