"""Acceptance against a naive recursive walk: random trees, duplicate siblings, ties."""

import jax
import jax.numpy as jnp
import numpy as np
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_jax.decode.accept import accept
from eagle_jax.decode.tree import Shape

ROWS, NODES = 3, 9
jitted = jax.jit(accept, static_argnums=3)


@st.composite
def trees(draw) -> tuple[list[int], list[int], list[int]]:
    """Parents, tokens and targets of one tree; two or three tokens, so that much matches."""
    parents = [0] + [draw(st.integers(0, i - 1)) for i in range(1, NODES)]
    token = st.integers(0, draw(st.integers(0, 2)))
    tokens = draw(st.lists(token, min_size=NODES, max_size=NODES))
    targets = draw(st.lists(token, min_size=NODES, max_size=NODES))
    return parents, tokens, targets


def ancestors(parents: list[int], node: int) -> set[int]:
    return {node} if node == 0 else {node} | ancestors(parents, parents[node])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(trees(), min_size=ROWS, max_size=ROWS))
def test_equals_the_recursive_walk(rows: list[tuple[list[int], list[int], list[int]]]) -> None:
    """Catches a match without its parent's match, a greedy first sibling that ends early, rows
    mixed up, and an emitted token taken from the drafted instead of the target's."""
    lines = [[ancestors(parents, node) for node in range(NODES)] for parents, _, _ in rows]
    shape = Shape(
        jnp.array([parents for parents, _, _ in rows]),
        jnp.array([[len(line) - 1 for line in tree] for tree in lines]),
        jnp.array([[[u in line for u in range(NODES)] for line in tree] for tree in lines]),
    )
    tokens, targets = (jnp.array([row[i] for row in rows]) for i in (1, 2))
    got = jitted(tokens, shape, targets, NODES)
    for row, (parents, words, wanted) in enumerate(rows):

        def children(node: int, parents=parents) -> list[int]:
            return [c for c in range(1, NODES) if parents[c] == node]

        path = reference.accept(children, np.array(words), np.array(wanted))
        assert int(got.count[row]) == len(path) - 1
        assert got.path[row].tolist() == path + [0] * (NODES - len(path))
        assert got.emitted[row, : len(path)].tolist() == [wanted[node] for node in path]


def test_a_tree_of_one_node_emits_the_targets_token() -> None:
    """Catches vanilla decoding broken by its own rule: the root never has to match anything."""
    zeros = jnp.zeros((2, 1), jnp.int32)
    shape = Shape(zeros, zeros, jnp.ones((2, 1, 1), bool))
    got = jitted(jnp.array([[4], [5]]), shape, jnp.array([[7], [5]]), 1)
    assert got.count.tolist() == [0, 0] and got.emitted.tolist() == [[7], [5]]


def test_the_longest_of_duplicate_siblings_wins() -> None:
    """Catches the walk that stops at the first matching child: its twin leads further."""
    shape = Shape(
        jnp.array([[0, 0, 0, 2]]),
        jnp.array([[0, 1, 1, 2]]),
        jnp.array([[[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]], bool),
    )
    got = jitted(jnp.array([[0, 6, 6, 8]]), shape, jnp.array([[6, 8, 8, 3]]), 3)
    assert got.count.tolist() == [2]
    assert got.path.tolist() == [[0, 2, 3]] and got.emitted.tolist() == [[6, 8, 3]]
