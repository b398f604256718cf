"""Medusa heads against the numpy reference, which is written from the paper."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from eagle_jax.drafters.medusa.module import MedusaHeads
from eagle_jax.models import Transformer, bind, init_params
from eagle_jax.params import Draft
from eagle_jax.testing import tiny_medusa, tiny_params, tiny_target


@pytest.mark.parametrize(
    ("changes", "tied"),
    [
        ({}, False),
        ({"num_heads": 2, "num_layers": 3}, False),
        ({"tie_lm_head": True}, False),
        ({"tie_lm_head": True}, True),
    ],
    ids=["own heads", "deep", "target's head", "target's embedding"],
)
def test_equals_the_reference(changes: dict, tied: bool) -> None:
    """Catches heads in the wrong order, a head fed by the one before, a block without its residual
    or bias, an activation outside of it, and the target's head in place of the draft's."""
    target = tiny_target(tie_word_embeddings=tied)
    config = tiny_medusa(target, **changes)
    rng = np.random.default_rng(1)
    draft = {
        name: jnp.asarray(rng.normal(size=x.shape) * 0.3, jnp.float32)
        for name, x in init_params(MedusaHeads, config, 0).items()
    }
    pair = dataclasses.replace(tiny_params(target), drafts={"medusa": Draft(draft, config)})
    features = rng.normal(size=(2, 5, 32))

    @jax.jit
    def scores(target, draft, features):
        whole = bind(Transformer, pair.target_config, target)
        return bind(MedusaHeads, config, draft).logits(features, whole)

    got = scores(pair.target, draft, jnp.asarray(features, jnp.float32))
    assert len(got) == config.num_heads
    for row in range(2):
        expected = reference.medusa(reference.Pair.of(pair), features[row])
        for mine, slow in zip(got, expected, strict=True):
            np.testing.assert_allclose(mine[row], slow, rtol=1e-4, atol=1e-4 * abs(slow).max())


def test_new_heads_say_what_the_target_says() -> None:
    """Catches a block that does not start as the identity: training would start from noise."""
    target = tiny_target()
    config = tiny_medusa(target, tie_lm_head=True)
    params, draft = tiny_params(target).target, init_params(MedusaHeads, config, 3)
    features = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 32)), jnp.float32)

    @jax.jit
    def scores(params, draft, features):
        whole = bind(Transformer, target, params)
        heads = bind(MedusaHeads, config, draft).logits(features, whole)
        return heads, whole.logits(features)

    heads, own = scores(params, draft, features)
    for head in heads:
        np.testing.assert_array_equal(head, own)
