"""The cache: rows written at their own place, nodes gathered in path order."""

import jax
import jax.numpy as jnp
import numpy as np

from eagle_jax.models import cache as caches


def random_block(t: int) -> caches.Cache:
    rng = np.random.default_rng(0)

    def block():
        return jnp.asarray(rng.normal(size=(3, 2, t, 5)), jnp.float32)

    return tuple((block(), block()) for _ in range(2))


def test_write_puts_each_row_at_its_own_start_and_nowhere_else() -> None:
    """Catches one start for the whole batch, swapped slot and head axes, and lost old slots."""
    old, new = random_block(9), random_block(4)
    starts = np.array([0, 5, 2])
    written = caches.write(old, new, jnp.asarray(starts))
    for layer in range(2):
        for which in range(2):
            expected = np.array(old[layer][which])
            for row, start in enumerate(starts):
                expected[row, :, start : start + 4] = new[layer][which][row]
            np.testing.assert_array_equal(written[layer][which], expected)


def test_one_row_is_written_without_a_scatter() -> None:
    """A scatter of one row is a slice update with checks around it, three launches on GPUs."""
    old, new = jnp.zeros((2, 3, 8, 4)), jnp.ones((2, 3, 2, 4))
    start = jnp.array([3, 5], jnp.int32)

    def placed(rows: int):
        return caches.place(old[:rows], new[:rows], start[:rows], axis=1)

    assert "scatter" in str(jax.make_jaxpr(lambda: placed(2))())
    assert "scatter" not in str(jax.make_jaxpr(lambda: placed(1))())
    np.testing.assert_array_equal(placed(1), placed(2)[:1])


def test_write_casts_to_the_cache_and_not_the_cache_to_the_block() -> None:
    """Catches a cache that silently becomes float32 (twice the memory) under bf16 parameters."""
    cache = caches.empty(2, 3, 2, 9, 5, jnp.dtype(jnp.bfloat16))
    written = caches.write(cache, random_block(4), jnp.zeros(3, jnp.int32))
    assert {x.dtype for pair in written for x in pair} == {jnp.dtype(jnp.bfloat16)}


def test_empty_is_zero() -> None:
    """Catches uninitialised memory: a masked NaN still poisons a weighted sum."""
    cache = caches.empty(2, 3, 2, 9, 5, jnp.dtype(jnp.float32))
    assert len(cache) == 2
    for pair in cache:
        for x in pair:
            np.testing.assert_array_equal(x, np.zeros((3, 2, 9, 5), np.float32))


def test_gather_takes_each_rows_own_nodes_in_order() -> None:
    """Catches a sorted or shared index: an accepted path may repeat the root and differs by row."""
    block = random_block(6)
    index = np.array([[0, 3, 5], [0, 0, 0], [0, 5, 1]])
    taken = caches.gather(block, jnp.asarray(index))
    for layer in range(2):
        for which in range(2):
            expected = np.stack([np.array(block[layer][which])[r][:, index[r]] for r in range(3)])
            np.testing.assert_array_equal(taken[layer][which], expected)
