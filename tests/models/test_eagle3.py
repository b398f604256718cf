"""The EAGLE-3 draft against the numpy reference, which is written from paper and published code."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from eagle_jax.drafters.eagle3.module import Eagle3Draft
from eagle_jax.models import Transformer, bind, init_params
from eagle_jax.models import cache as caches
from eagle_jax.models.transformer import packed_mask
from eagle_jax.params import Draft, Params
from eagle_jax.testing import tiny_eagle3, tiny_params, tiny_target

LENGTH, VOCAB = 9, 61
VARIANTS = {
    "plain": {},
    "fc_norm": {"fc_norm": True},
    "norm_output": {"norm_output": True},
    "both, two streams": {"fc_norm": True, "norm_output": True, "aux_layers": (2, 0)},
    "qkv bias, grouped": {
        "attention_bias": True,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "rope_theta": 300.0,
    },
}


@functools.cache
def make_pair(name: str) -> Params:
    """Random arrays everywhere, norms and biases too, and a vocabulary with uneven gaps."""
    target = tiny_target(VOCAB)
    config = tiny_eagle3(target, **VARIANTS[name])
    rng = np.random.default_rng(1)
    draft = {
        key: jnp.asarray(rng.normal(size=x.shape) * 0.3 + key.endswith("scale"), jnp.float32)
        for key, x in init_params(Eagle3Draft, config, 0).items()
    }
    known = np.sort(rng.permutation(VOCAB)[: config.draft_vocab_size])
    draft["d2t"] = jnp.asarray(known - np.arange(len(known)), jnp.int32)
    return dataclasses.replace(tiny_params(target), drafts={"eagle3": Draft(draft, config)})


@functools.cache
def applied(name: str):
    """The module's call and its scores over the target's vocabulary, compiled."""
    config = make_pair(name).drafts["eagle3"].config

    def apply(target, draft, states, tokens, positions, mask, cached):
        embed = bind(Transformer, make_pair(name).target_config, target).embed_tokens
        module = bind(Eagle3Draft, config, draft)
        after, block = module(embed(tokens), states, positions, mask, **cached)
        scores = jnp.full((*tokens.shape, VOCAB), -jnp.inf)
        return after, scores.at[..., module.tokens()].set(module.logits(after)), block

    return jax.jit(apply)


def run(name: str, states, tokens, positions, mask, **cached):
    pair = make_pair(name)
    states, tokens = jnp.asarray(states, jnp.float32), jnp.asarray(tokens)
    draft = pair.drafts["eagle3"].params
    return applied(name)(pair.target, draft, states, tokens, positions, mask, cached)


def close(got, expected) -> None:
    scale = abs(np.where(np.isfinite(expected), expected, 0)).max()
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * scale)


def inputs(rows: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(2)
    return rng.normal(size=(rows, LENGTH, 32)), rng.integers(0, VOCAB, (rows, LENGTH))


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_the_reference(name: str) -> None:
    """Catches a normed residual, embedding and state swapped, a norm on the wrong half, scores of
    the un-normed state, a state fed back normed (or not), and ids that are not i + d2t[i]."""
    states, tokens = inputs(2)
    positions = jnp.broadcast_to(jnp.arange(LENGTH)[None], (2, LENGTH))
    mask = packed_mask(jnp.zeros((2, LENGTH), jnp.int32))
    after, scores, _ = run(name, states, tokens, positions, mask)
    for row in range(2):
        expected = reference.draft3(reference.Pair.of(make_pair(name)), states[row], tokens[row])
        close(after[row], expected[0])
        close(scores[row], expected[1])


@pytest.mark.parametrize("name", VARIANTS)
def test_fuses_the_streams_that_enter_the_chosen_layers(name: str) -> None:
    """Catches streams after the final norm, taken behind their layer, or in another order, and one
    norm shared by all of them."""
    pair, tokens = make_pair(name), inputs(2)[1]

    @jax.jit
    def fuse(target, draft, tokens):
        positions = jnp.broadcast_to(jnp.arange(LENGTH)[None], tokens.shape)
        mask = packed_mask(jnp.zeros(tokens.shape, jnp.int32))
        output = bind(Transformer, pair.target_config, target)(tokens, positions, mask)
        module = bind(Eagle3Draft, pair.drafts["eagle3"].config, draft)
        return module.fuse(module.features(output))

    got = fuse(pair.target, pair.drafts["eagle3"].params, jnp.asarray(tokens))
    slow = reference.Pair.of(pair)
    for row in range(2):
        close(got[row], reference.fused(slow, reference.residuals(slow, tokens[row])))


@pytest.mark.parametrize("name", ["plain", "both, two streams"])
def test_cached_pairs_and_a_tree_in_levels_equal_whole_paths(name: str) -> None:
    """Catches a tree level that misses its ancestors, sees its siblings, or sees stale slots.

    Pairs 0..3 are cached (with garbage behind them), then two levels: nodes a, b; then c below a.
    """
    states, tokens = inputs(1)
    positions = jnp.arange(LENGTH)[None]
    causal = packed_mask(jnp.zeros((1, 4), jnp.int32))
    _, _, known = run(name, states[:, :4], tokens[:, :4], positions[:, :4], causal)
    filled = (jnp.full((1, 1, 12, 16), 1e3), jnp.full((1, 1, 12, 16), 1e3))
    (prefix,) = caches.write((filled,), (known,), jnp.zeros(1, jnp.int32))
    cached = {"prefix": prefix, "lengths": jnp.array([4])}
    level = jnp.array([[4, 4]])
    own = jnp.eye(2, dtype=bool)[None]
    first, _, block = run(name, states[:, 4:6], tokens[:, 4:6], level, own, **cached)
    sees_a = jnp.array([[[True, False, True]]])
    below, _, _ = run(
        name, states[:, 6:7], tokens[:, 6:7], level[:, :1] + 1, sees_a, before=block, **cached
    )
    slow = reference.Pair.of(make_pair(name))
    for got, path in ((first[0, 0], [4]), (first[0, 1], [5]), (below[0, 0], [4, 6])):
        chosen = [0, 1, 2, 3, *path]
        close(got, reference.draft3(slow, states[0, chosen], tokens[0, chosen].tolist())[0][-1])
