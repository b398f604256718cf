"""Processors against naive numpy, with ties and extremes; noise keyed by position and row."""

import decoding
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_jax.decode.sampling import (
    draft_noise,
    perturb,
    position_noise,
    position_uniform,
    process,
)
from eagle_jax.decode.top_k import top_k

VOCAB = 7
jitted = jax.jit(process)


def sampling(*args, rows: int = 1, **fields):
    return decoding.sampling(*args, rows=rows, vocab=VOCAB, **fields)


# Halves and few values: ties are exact, and temperatures divide without rounding.
tied = st.lists(st.integers(-6, 6).map(lambda n: n / 2), min_size=VOCAB, max_size=VOCAB)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    tied,
    st.sampled_from([0.5, 1.0, 2.0]),
    st.sampled_from([0, 1, 2, 3, VOCAB - 1, VOCAB, 100]),
    st.sampled_from([1e-6, 0.13, 0.37, 0.71, 0.93, 0.999, 1.0]),
)
def test_process_equals_naive_numpy(
    logits: list[float], temperature: float, top_k: int, top_p: float
) -> None:
    """Catches >= for >, the token that crosses p left out, top-p before top-k, k over the
    vocabulary, and ties broken by the sort."""
    rule = reference.Rule(temperature, top_k, top_p)
    got = jitted(jnp.array([logits], jnp.float32), sampling(temperature, top_k, top_p))
    expected = reference.process(np.array(logits), rule)
    np.testing.assert_allclose(got[0], expected, rtol=1e-6)


def test_extremes() -> None:
    """Catches a filter that leaves nothing, and one that NaNs on a certain token."""
    logits = jnp.array([[0.0, 3.0, 1e30, -1e30, 2.0]], jnp.float32)
    for settings_ in (sampling(1.0, top_p=1e-9), sampling(1.0, top_k=1), sampling(1e-3, 3, 0.5)):
        kept = np.isfinite(jitted(logits, settings_))
        assert kept[0].tolist() == [False, False, True, False, False]
    flat = jitted(jnp.zeros((1, 5), jnp.float32), sampling(1.0, top_k=2, top_p=0.1))
    assert np.isfinite(flat).all()  # all tie: all stay


def test_process_works_on_any_leading_axes() -> None:
    """Catches a threshold of one row applied to another."""
    logits = np.random.default_rng(0).normal(size=(2, 3, VOCAB)).astype(np.float32)
    got = jitted(jnp.asarray(logits), sampling(0.7, 3, 0.8, rows=2))
    rule = reference.Rule(0.7, 3, 0.8)
    for i in range(2):
        for j in range(3):
            np.testing.assert_allclose(got[i, j], reference.process(logits[i, j], rule), rtol=1e-5)


def test_noise_is_that_of_row_seed_and_absolute_position() -> None:
    """Catches noise that depends on the batch, on the block's start, or on its length."""
    seeds, first = [3, 4000000000], [5, 0]
    got = jax.jit(position_noise, static_argnums=(2, 3))(
        jnp.array(seeds, jnp.uint32), jnp.array(first), 4, VOCAB
    )
    for row in range(2):
        for i in range(4):
            expected = reference.gumbel(seeds[row], first[row] + i, VOCAB)
            np.testing.assert_array_equal(got[row, i], expected.astype(np.float32))


def test_noise_of_drafts_and_coins_has_keys_of_its_own() -> None:
    """Catches a draft that drafts with the target's noise, and coins that know of either: rejection
    would then be biased."""
    seeds, first = [3, 4000000000], [5, 0]
    rows = (jnp.array(seeds, jnp.uint32), jnp.array(first))
    noise = jax.jit(draft_noise, static_argnums=(2, 3))(*rows, 4, VOCAB)
    coins = jax.jit(position_uniform, static_argnums=2)(*rows, 4)
    for row in range(2):
        for i in range(4):
            place = (seeds[row], first[row] + i)
            own = reference.own_gumbel(*place, VOCAB).astype(np.float32)
            np.testing.assert_array_equal(noise[row, i], own)
            assert float(coins[row, i]) == reference.uniform(*place)
            assert not np.isclose(own, reference.gumbel(*place, VOCAB)).any()


def test_argmax_of_perturbed_logits_has_the_processed_law() -> None:
    """Catches noise of another law (uniform, normal, scaled by temperature)."""
    logits, rows = np.array([1.0, 0.0, -1.0, 2.0, 0.5], np.float32), 20000
    settings_, rule = sampling(1.5, 4, rows=rows), reference.Rule(1.5, 4)

    @jax.jit
    def draw(seeds):
        noise = position_noise(seeds, jnp.zeros(rows, jnp.int32), 1, 5)[:, 0]
        spread = jnp.broadcast_to(jnp.asarray(logits)[None], (rows, 5))
        return jnp.argmax(perturb(spread, noise, settings_), axis=-1)

    counts = np.bincount(draw(jnp.arange(rows, dtype=jnp.uint32)), minlength=5)
    probs = reference.softmax(reference.process(logits, rule))
    assert counts[2] == probs[2] == 0
    np.testing.assert_allclose(counts / rows, probs, atol=4 * 0.5 / np.sqrt(rows))


def test_greedy_needs_no_noise_and_switches_filters_off() -> None:
    """Catches a division by temperature 0, and settings that compile a program twice."""
    logits = jnp.array([[0.0, 2.0, 1.0]])
    greedy = sampling(0.0, 2, 0.5)
    assert (greedy.greedy, greedy.filters) == (True, ())
    np.testing.assert_array_equal(perturb(logits, None, greedy), logits)
    plain = sampling(0.5, 0, 1.0)
    assert (plain.greedy, plain.filters) == (False, ())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((-0.1, 0, 1.0), "temperature=-0.1: must be 0"),
        ((float("nan"), 0, 1.0), "temperature=nan: must be 0"),
        ((float("inf"), 0, 1.0), "temperature=inf: must be 0"),
        ((1.0, -1, 1.0), "top_k=-1: must be 0"),
        ((1.0, 0, 0.0), "top_p=0.0: must be above 0"),
        ((1.0, 0, 1.1), "top_p=1.1: must be above 0"),
        ((1.0, 0, float("nan")), "top_p=nan: must be above 0"),
    ],
)
def test_errors(arguments: tuple[float, int, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        sampling(*arguments)


@pytest.mark.parametrize("vocab", [513, 640, 1000])
def test_two_stages_equal_top_k(vocab: int) -> None:
    """Catches ties that go to another index than the lowest, and padding among the best."""
    rng = np.random.default_rng(vocab)
    rows = np.concatenate(
        [
            rng.normal(size=(40, vocab)),
            rng.integers(0, 3, (40, vocab)),  # ties everywhere, also between chunks
            np.zeros((1, vocab)),
            np.where(np.arange(vocab) == vocab - 1, 0.0, -np.inf)[None],
            rng.integers(0, 2, (40, vocab)) - 1.0 * (np.arange(vocab) > 3)[None] * 5,
        ]
    )
    logits = jnp.asarray(rows, jnp.float32)[None]
    expected, index = jax.lax.top_k(logits, 8)
    got, place = top_k(logits, 8)
    assert np.array_equal(place, index)
    assert np.array_equal(got, expected)
