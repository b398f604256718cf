"""Static trees against brute force over their paths; names and errors."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_jax.decode.tree import MC_SIM_7B_63, StaticTree, chain, named_tree, static_tree

Path = tuple[int, ...]


@st.composite
def path_sets(draw) -> list[Path]:
    """Closed sets of rank paths, in any order; ranks may have gaps."""
    paths: list[Path] = [()]
    for _ in range(draw(st.integers(1, 12))):
        parent = draw(st.sampled_from(paths))
        paths.append((*parent, draw(st.integers(0, 5))))
    return draw(st.permutations(sorted(set(paths) - {()})))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(path_sets())
def test_arrays_equal_brute_force(paths: list[Path]) -> None:
    """Catches parents off by the root's index, order-dependent numbering, grandparents left out."""
    tree = static_tree(paths)
    nodes = [(), *tree.paths]
    assert sorted(nodes) == sorted([(), *paths])
    assert tree.nodes == len(nodes) and tree.depth == max(map(len, paths))
    for i, node in enumerate(nodes):
        assert tree.depths[i] == len(node)
        assert tree.ranks[i] == (node[-1] if node else 0)
        assert nodes[tree.parents[i]] == node[:-1]
        assert tree.parents[i] < i or i == 0
        for j, other in enumerate(nodes):
            assert tree.ancestors[i, j] == (node[: len(other)] == other)
    assert list(tree.depths) == sorted(tree.depths)  # levels are contiguous


@settings(max_examples=50, deadline=None, derandomize=True)
@given(path_sets())
def test_order_of_paths_does_not_matter(paths: list[Path]) -> None:
    """Catches equal trees with different hashes, which would compile twice."""
    assert static_tree(paths) == static_tree(paths[::-1])
    assert hash(static_tree(paths)) == hash(static_tree(paths[::-1]))


def test_shape_repeats_the_tree_for_every_row() -> None:
    """Catches a transposed ancestor mask: it must be [node, ancestor]."""
    tree = static_tree([[0], [1], [1, 0]])
    shape = tree.shape(2)
    for row in range(2):
        np.testing.assert_array_equal(shape.parents[row], [0, 0, 0, 2])
        np.testing.assert_array_equal(shape.depth[row], [0, 1, 1, 2])
        np.testing.assert_array_equal(
            shape.ancestors[row], [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]
        )


def test_the_published_tree() -> None:
    """Catches Medusa's tree of the same name (63 paths) and any lost node: 4/8/8/3/2 per depth."""
    tree = named_tree("mc_sim_7b_63")
    assert tree is MC_SIM_7B_63
    assert tree.nodes == 26 and tree.depth == 5
    assert np.bincount(tree.depths).tolist() == [1, 4, 8, 8, 3, 2]
    inner = sorted({path[:-1] for path in tree.paths}, key=len)
    assert np.bincount([len(path) for path in inner]).tolist() == [1, 4, 4, 1, 1]
    assert tree.nodes - len(inner) == 15  # leaves
    assert {(3, 0), (0, 2, 1), (1, 0, 0), (0, 0, 0, 0, 1)} <= set(tree.paths)


def test_names() -> None:
    assert named_tree("chain-3") == chain(3) == static_tree([[0, 0, 0], [0], [0, 0]])
    assert named_tree("0 1 00 01") == static_tree([[0], [1], [0, 0], [0, 1]])
    assert StaticTree(()).nodes == 1 and StaticTree(()).depth == 0


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mc_sim", "tree='mc_sim': unknown; use mc_sim_7b_63, chain-N"),
        ("", "tree='': unknown"),
        ("chain-", "tree='chain-': unknown"),
        ("chain-0", "chain depth=0: must be at least 1"),
        ("0 00 11", "tree path (1, 1): its parent (1,) is missing"),
        ("0 0", "a path stands twice"),
        ("0 x", "tree='0 x': unknown"),
    ],
)
def test_errors_of_names(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as info:
        named_tree(name)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("paths", [[[]], [[-1]], [[0], [0, -1]]])
def test_impossible_paths_are_errors(paths: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="must hold ranks of 0 or more"):
        static_tree(paths)
