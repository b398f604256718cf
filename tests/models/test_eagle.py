"""The EAGLE-1 draft against the numpy reference, which is written from the paper."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from eagle_jax.drafters.eagle.module import EagleDraft
from eagle_jax.models import Transformer, bind, init_params
from eagle_jax.models import cache as caches
from eagle_jax.models.transformer import packed_mask
from eagle_jax.params import Draft, Params
from eagle_jax.testing import random_params, tiny_draft, tiny_params, tiny_target

LENGTH = 9


def make_pair(**changes) -> Params:
    """Random weights everywhere, also in biases and norms, which are 0 and 1 at birth."""
    target = tiny_target()
    config = tiny_draft(target, **changes)
    rng = np.random.default_rng(1)
    draft = {
        name: jnp.asarray(rng.normal(size=x.shape) * 0.3 + name.endswith("scale"), jnp.float32)
        for name, x in init_params(EagleDraft, config, 0).items()
    }
    return dataclasses.replace(tiny_params(target), drafts={"eagle": Draft(draft, config)})


PAIRS = {
    "bias": make_pair(),
    "no_bias_qkv_bias": make_pair(bias=False, attention_bias=True, num_key_value_heads=2),
    "theta": make_pair(rope_theta=300.0, head_dim=6, num_attention_heads=4, num_key_value_heads=2),
}


def inputs(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Features and tokens of `LENGTH` pairs per row."""
    rng = np.random.default_rng(2)
    return rng.normal(size=(rows, LENGTH, 32)), rng.integers(0, 61, (rows, LENGTH))


def run(pair: Params, features, tokens, positions, mask, **cached):
    def apply(target, draft, features, tokens, positions, mask, cached):
        embed = bind(Transformer, pair.target_config, target).embed_tokens
        module = bind(EagleDraft, pair.drafts["eagle"].config, draft)
        return module(embed(tokens), features, positions, mask, **cached)

    features = jnp.asarray(features, jnp.float32)
    draft = pair.drafts["eagle"].params
    return jax.jit(apply)(pair.target, draft, features, tokens, positions, mask, cached)


def causal(rows: int, length: int):
    return packed_mask(jnp.zeros((rows, length), jnp.int32))


@pytest.mark.parametrize("name", PAIRS)
def test_equals_the_reference(name: str) -> None:
    """Catches an input norm, feature and embedding swapped in fc, a lost bias, wrong RoPE base."""
    pair = PAIRS[name]
    features, tokens = inputs(2)
    positions = jnp.broadcast_to(jnp.arange(LENGTH)[None], (2, LENGTH))
    got, _ = run(pair, features, jnp.asarray(tokens), positions, causal(2, LENGTH))
    for row in range(2):
        expected = reference.draft(reference.Pair.of(pair), features[row], tokens[row])
        np.testing.assert_allclose(got[row], expected, rtol=1e-4, atol=1e-4 * abs(expected).max())


def test_position_is_the_features_and_only_differences_matter() -> None:
    """The reference puts pair i at position i; shifting all positions must change nothing."""
    pair = PAIRS["bias"]
    features, tokens = inputs(1)
    positions = jnp.arange(LENGTH)[None]
    first, _ = run(pair, features, jnp.asarray(tokens), positions, causal(1, LENGTH))
    later, _ = run(pair, features, jnp.asarray(tokens), positions + 100, causal(1, LENGTH))
    uneven, _ = run(pair, features, jnp.asarray(tokens), positions * 2, causal(1, LENGTH))
    np.testing.assert_allclose(later, first, atol=1e-4)
    assert abs(np.asarray(uneven - first)).max() > 1e-2


def test_cached_pairs_and_a_tree_in_levels_equal_whole_paths() -> None:
    """Catches a tree level that misses its ancestors, sees its siblings, or sees stale slots.

    Pairs 0..3 are cached (with garbage behind them), then two levels: nodes a, b; then c below a.
    """
    pair = PAIRS["bias"]
    features, tokens = inputs(1)
    tokens = jnp.asarray(tokens)
    positions = jnp.arange(LENGTH)[None]

    _, known = run(pair, features[:, :4], tokens[:, :4], positions[:, :4], causal(1, 4))
    filled = (jnp.full((1, 1, 12, 16), 1e3), jnp.full((1, 1, 12, 16), 1e3))
    (prefix,) = caches.write((filled,), (known,), jnp.zeros(1, jnp.int32))
    cached = {"prefix": prefix, "lengths": jnp.array([4])}
    level = jnp.array([[4, 4]])
    a_and_b, block = run(
        pair, features[:, 4:6], tokens[:, 4:6], level, jnp.eye(2, dtype=bool)[None], **cached
    )
    sees_a = jnp.array([[[True, False, True]]])
    c, _ = run(
        pair, features[:, 6:7], tokens[:, 6:7], level[:, :1] + 1, sees_a, before=block, **cached
    )
    slow = reference.Pair.of(pair)
    for got, path in ((a_and_b[0, 0], [4]), (a_and_b[0, 1], [5]), (c[0, 0], [4, 6])):
        chosen = [0, 1, 2, 3, *path]
        expected = reference.draft(slow, features[0, chosen], [int(tokens[0, i]) for i in chosen])[
            -1
        ]
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", [{}, {"tie_word_embeddings": True}, {"softcap": 2.0}])
def test_a_draft_vocabulary_scores_some_of_the_targets_tokens(target) -> None:
    """Catches columns of other tokens, and scores that miss the target's cap."""
    cap = {"final_logit_softcapping": target["softcap"]} if "softcap" in target else target
    config = tiny_target(**cap)
    weights = random_params(Transformer, config, 0)
    known = np.random.default_rng(3).permutation(config.vocab_size)[:17]
    tied = weights["embed_tokens.embedding"].T
    own = tiny_draft(config, draft_vocab_size=17)
    draft = {
        **init_params(EagleDraft, own, 0),
        "lm_head.kernel": weights.get("lm_head.kernel", tied)[:, known],
        "d2t": jnp.asarray(known - np.arange(17), jnp.int32),
    }

    @jax.jit
    def scores(features):
        module, whole = bind(EagleDraft, own, draft), bind(Transformer, config, weights)
        return module.logits(features, whole), whole.logits(features), module.tokens()

    got, whole, tokens = scores(jnp.asarray(inputs(2)[0], jnp.float32))
    np.testing.assert_array_equal(tokens, known)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, whole[..., known], rtol=1e-5, atol=1e-5)
