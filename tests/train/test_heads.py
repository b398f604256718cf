"""Medusa heads and distillation against slow NumPy versions that see one conversation at a time."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slow_models import VOCAB, conversations, lively, packed, softmax, target_features, three_rows

from eagle_jax.config import Distillation, MedusaConfig, MedusaTraining
from eagle_jax.drafters.medusa.module import MedusaHeads
from eagle_jax.drafters.medusa.objective import MedusaObjective
from eagle_jax.drafters.model.objective import DistillationObjective
from eagle_jax.models import Transformer, init_params
from eagle_jax.testing import tiny_target
from eagle_jax.train.objectives import means

TARGET_CONFIG = tiny_target(VOCAB)
TARGET = lively(init_params(Transformer, TARGET_CONFIG, 0), 0)
HEAD = np.asarray(TARGET["lm_head.kernel"], np.float64)
HEADS = MedusaConfig(VOCAB, TARGET_CONFIG.hidden_size, num_heads=3, num_layers=2)
SMALL = tiny_target(VOCAB, hidden_size=24, num_hidden_layers=1, tie_word_embeddings=True)


def medusa(labels: Literal["hard", "soft"] = "hard", tied: bool = False) -> MedusaObjective:
    draft = dataclasses.replace(HEADS, tie_lm_head=tied)
    settings = MedusaTraining(draft=draft, target="", decay=0.7, labels=labels)
    return MedusaObjective(settings, TARGET_CONFIG, TARGET)


DISTILLATION = DistillationObjective(Distillation(draft=SMALL, target=""), TARGET_CONFIG, TARGET)


def slow_medusa(task, params, talks):
    """Loss, counts and hits (top-1, top-3) of every head."""
    draft = task.settings.draft
    losses, counts, hits = np.zeros((3, draft.num_heads))[:, :, None].repeat(2, 2)
    for tokens, marked in talks:
        real = target_features(TARGET, TARGET_CONFIG, tokens)
        for i in range(draft.num_heads):
            x = real
            for block in range(draft.num_layers):
                name = f"heads.{i}.blocks.{block}.linear"
                y = x @ np.asarray(params[f"{name}.kernel"], np.float64)
                y = y + np.asarray(params[f"{name}.bias"])
                x = x + y / (1 + np.exp(-y))
            if draft.tie_lm_head:
                x = x @ np.asarray(params[f"heads.{i}.lm_proj.kernel"], np.float64)
            own = params.get(f"heads.{i}.lm_head.kernel", HEAD)
            probs = softmax(x @ np.asarray(own, np.float64))
            for drafted in range(2 + i, len(tokens)):
                if not marked[drafted]:
                    continue
                label = np.eye(VOCAB)[tokens[drafted]]
                if task.settings.labels == "soft":
                    label = softmax(real[drafted - 1] @ HEAD)
                row = probs[drafted - 2 - i]
                losses[i] -= (label * np.log(row)).sum()
                counts[i] += 1
                order = list(np.argsort(-row, kind="stable"))
                hits[i] += order.index(label.argmax()) < 1, order.index(label.argmax()) < 3
    loss = sum(0.7**i * losses[i, 0] / counts[i, 0] for i in range(draft.num_heads))
    return loss, counts[:, 0], hits


@pytest.mark.parametrize("labels", ["hard", "soft"])
@pytest.mark.parametrize("tied", [False, True])
def test_medusa_matches_the_slow_version(labels, tied):
    """A head that learns another head's token, or reads the wrong vocabulary matrix."""
    task, talks = medusa(labels, tied), conversations()
    params = lively(task.init(0, task.frozen()), 2)
    loss, sums = jax.jit(task.loss)(params, TARGET, three_rows(talks), None)
    want, counts, hits = slow_medusa(task, params, talks)
    assert len(set(counts)) == 3 and hits[:, 0].sum() < hits[:, 1].sum()
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    values = means(sums)
    np.testing.assert_allclose(values["loss"], want, rtol=1e-5)
    np.testing.assert_allclose(sums["count"], counts[0])
    np.testing.assert_allclose(values["top3"], hits[0, 1] / counts[0], rtol=1e-5)
    for i, name in enumerate(("top1", "top1_h1", "top1_h2")):
        np.testing.assert_allclose(values[name], hits[i, 0] / counts[i], rtol=1e-5)


def test_medusa_heads_start_as_the_target():
    """Heads that start from random vocabulary matrices, or that share one array."""
    task = medusa()
    params = task.init(0, task.frozen())
    kernels = [params[f"heads.{i}.lm_head.kernel"] for i in range(3)]
    assert all((kernel == TARGET["lm_head.kernel"]).all() for kernel in kernels)
    assert len({kernel.unsafe_buffer_pointer() for kernel in kernels}) == 3
    assert set(params) == set(init_params(MedusaHeads, HEADS, 0))
    assert not any(np.any(x) for name, x in params.items() if "linear" in name)


def slow_distillation(params, talks):
    sums = dict.fromkeys(("loss", "top1", "top3", "count"), 0.0)
    own = np.asarray(params["embed_tokens.embedding"], np.float64).T
    for tokens, marked in talks:
        real = softmax(target_features(TARGET, TARGET_CONFIG, tokens) @ HEAD)
        drafted = softmax(target_features(params, SMALL, tokens) @ own)
        for label in range(1, len(tokens)):
            if marked[label]:
                want, got = real[label - 1], drafted[label - 1]
                sums["loss"] -= (want * np.log(got)).sum()
                place = list(np.argsort(-got, kind="stable")).index(want.argmax())
                sums["top1"] += place < 1
                sums["top3"] += place < 3
                sums["count"] += 1
    return sums


def test_distillation_matches_the_slow_version():
    """The target's distribution of another row, or the target's head on the draft's features."""
    talks = conversations()
    params = lively(DISTILLATION.init(0, DISTILLATION.frozen()), 2)
    # Head and embedding are one matrix: of standard deviation one it would be all certain.
    params["embed_tokens.embedding"] = 0.3 * params["embed_tokens.embedding"]
    loss, sums = jax.jit(DISTILLATION.loss)(params, TARGET, three_rows(talks), None)
    want = slow_distillation(params, talks)
    assert 0 < want["top1"] < want["top3"] < want["count"]
    for name, value in want.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(loss, want["loss"] / want["count"], rtol=1e-5)


TASKS = {"medusa": medusa(), "tied": medusa("soft", tied=True), "distillation": DISTILLATION}


@pytest.mark.parametrize("name", TASKS)
def test_gradient_step_lowers_the_loss(name):
    """A gradient that is cut, or of the wrong sign."""
    task = TASKS[name]
    batch = three_rows(conversations())
    params = lively(task.init(0, task.frozen()), 1)
    step = jax.jit(jax.value_and_grad(lambda p: task.loss(p, TARGET, batch, None)[0]))
    before, gradient = step(params)
    assert all(np.any(x) for x in gradient.values())
    assert step(jax.tree.map(lambda x, g: x - 1e-3 * g, params, gradient))[0] < before


@pytest.mark.parametrize("name", TASKS)
def test_packing_changes_nothing(name):
    """Rows of one conversation learn from the next one's tokens."""
    task, talks = TASKS[name], conversations(1)
    params, loss = lively(task.init(0, task.frozen()), 1), jax.jit(task.loss)
    together = loss(params, TARGET, three_rows(talks), None)
    alone = loss(params, TARGET, packed([[talk] for talk in talks]), None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), together, alone)


@pytest.mark.parametrize("name", TASKS)
def test_nothing_marked_gives_zero(name):
    """0 / 0 in the mean of a head without rows."""
    task = TASKS[name]
    batch = three_rows(conversations()) | {"loss_mask": jnp.zeros((3, 24))}
    loss, sums = jax.jit(task.loss)(task.init(0, task.frozen()), TARGET, batch, None)
    assert loss == 0.0 and not any(means(sums).values())


def test_remat_agrees():
    """Recomputation that computes something else."""
    batch = three_rows(conversations())
    params = lively(DISTILLATION.init(0, DISTILLATION.frozen()), 1)
    saving = dataclasses.replace(DISTILLATION, remat=True)
    one, two = (
        jax.jit(jax.grad(lambda p, task=task: task.loss(p, TARGET, batch, None)[0]))(params)
        for task in (DISTILLATION, saving)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one, two)


def test_flops_count_every_matrix_once():
    """Heads left out, or a frozen vocabulary matrix counted as trained."""
    d, n = HEADS.hidden_size, 100
    matrices = sum(x.size for k, x in TARGET.items() if x.ndim == 2 and "embed" not in k)
    attention = 2 * 2 * TARGET_CONFIG.num_attention_heads * TARGET_CONFIG.head_dim * n
    head = 2 * d * VOCAB
    target = 2 * matrices + attention
    blocks = 3 * 2 * (2 * d * d)
    assert medusa().flops_per_token(n) == target - head + 3 * (blocks + 3 * head)
    tied = medusa("soft", tied=True).flops_per_token(n)
    squares = 3 * (2 * d * d)  # before the shared vocabulary head
    assert tied == target + 3 * (blocks + squares) + 2 * 3 * head
    small = init_params(Transformer, SMALL, 0)
    own = 2 * sum(x.size for x in small.values() if x.ndim == 2)  # the embedding is the head
    own += 2 * SMALL.num_attention_heads * SMALL.head_dim * n
    assert DISTILLATION.flops_per_token(n) == target + 3 * own
