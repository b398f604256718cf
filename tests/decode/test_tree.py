"""Static trees against brute force over their paths, dynamic ones against slow growth; names."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_jax.decode.tree import (
    MC_SIM_7B_63,
    DynamicTree,
    StaticTree,
    best_tree,
    chain,
    grow,
    named_tree,
    rerank,
    static_tree,
)

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
    assert isinstance(tree, StaticTree) and tree is MC_SIM_7B_63
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
    assert named_tree("dynamic-5-8-31") == DynamicTree(depth=5, k=8, drafted=31)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mc_sim", "tree='mc_sim': unknown; use mc_sim_7b_63, chain-N"),
        ("", "tree='': unknown"),
        ("chain-", "tree='chain-': unknown"),
        ("chain-0", "chain depth=0: must be from 1 to 1023"),
        ("0 00 11", "tree path (1, 1): its parent (1,) is missing"),
        ("0 0", "a path stands twice"),
        ("0 x", "tree='0 x': unknown"),
        ("dynamic-6-10", "tree='dynamic-6-10': unknown; use mc_sim_7b_63, chain-N, dynamic-DEPTH"),
        ("dynamic-0-10-5", "tree depth=0: must be a whole number above 0"),
        ("dynamic-6-0-5", "tree k=0: must be a whole number above 0"),
        ("dynamic-6-10-0", "tree drafted=0: must be a whole number above 0"),
        ("dynamic-2-3-13", "tree drafted=13: depth 2 and k 3 find only 12 candidates; use at most"),
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


ENVELOPES = [
    DynamicTree(depth=1, k=6, drafted=4),
    DynamicTree(depth=3, k=3, drafted=7),
    DynamicTree(depth=5, k=2, drafted=18),  # the whole pool
    DynamicTree(depth=4, k=4, drafted=21),
]
TREES = 2600  # of each


def pools(tree: DynamicTree, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and parents of random pools, ties everywhere: a child's score is its parent's or a
    step or two less. Some pools hold -0.0, which `top_k` ranks below 0.0, and -inf."""
    rng = np.random.default_rng(seed)
    scores = np.zeros((TREES, tree.pool + 1), np.float32)  # the root's is 0
    scores[::3, 0] = -0.0
    depth, parents = np.zeros((TREES, tree.pool + 1), int), np.zeros((TREES, tree.pool), np.int32)
    rows = np.arange(TREES)
    steps = np.array([0.0, -0.0, 0.0, -1.0, -2.0, -np.inf], np.float32)
    for i in range(tree.pool):
        parent = rng.integers(0, i + 1, TREES)
        parent = np.where(depth[rows, parent] < tree.depth, parent, 0)
        step = steps[rng.integers(0, np.where(rows % 2, 6, 5))]
        scores[:, i + 1] = scores[rows, parent] + step
        parents[:, i], depth[:, i + 1] = parent, depth[rows, parent] + 1
    return scores[:, 1:], parents


@pytest.mark.parametrize("tree", ENVELOPES, ids=str)
def test_the_best_candidates_are_a_tree(tree: DynamicTree) -> None:
    """Catches an orphan (a node whose parent was not chosen hangs on the root), ties that do not go
    to the lowest index, parents off by the root's index, and depths that count too few levels."""
    scores, parents = pools(tree, seed=tree.depth)
    ids = np.broadcast_to(np.arange(tree.pool, dtype=np.int32) + 100, scores.shape)
    root = np.arange(TREES, dtype=np.int32) % 50
    got = jax.jit(functools.partial(rerank, tree=tree))(
        *map(jnp.asarray, (ids, scores, parents, root))
    )
    tokens, shape = np.asarray(got.tokens), jax.tree.map(np.asarray, got.shape)
    assert got.logits is None and tokens.shape == (TREES, tree.nodes)
    below = 0
    for row in range(TREES):
        chosen = reference.best_first(scores[row].tolist(), parents[row].tolist(), tree.drafted)
        assert tokens[row].tolist() == [root[row], *(i + 100 for i in chosen)]
        lines: list[list[int]] = [[0]]  # nodes from each node up to the root
        for node, i in enumerate(chosen, start=1):
            up = int(parents[row, i])
            above = 0 if up == 0 else chosen.index(up - 1) + 1
            assert shape.parents[row, node] == above < node
            lines.append([node, *lines[above]])
        assert shape.depth[row].tolist() == [len(line) - 1 for line in lines]
        seen = [np.flatnonzero(line).tolist() for line in shape.ancestors[row]]
        assert seen == [sorted(line) for line in lines]
        below += int(shape.depth[row].max() > 1)
    assert below > TREES / 2 or tree.depth == 1  # they are no stars


def test_a_chain_of_full_depth_grows_whole() -> None:
    """Catches ancestors that reach one level too few."""
    shape = jax.jit(grow, static_argnums=1)(jnp.array([0, 0, 1, 2, 3, 0]), 4)
    assert shape.depth.tolist() == [0, 1, 2, 3, 4, 1]
    assert np.asarray(shape.ancestors)[4].tolist() == [True] * 5 + [False]


def test_the_official_command_line_in_our_words() -> None:
    """Catches a longest draft or a pool off by one: official `--total-token 60 --depth 5 --top-k
    10` drafts 59 tokens, at most 6 deep, out of 10 + 5 * 100."""
    tree = DynamicTree()
    assert (tree.depth - 1, tree.k, tree.drafted + 1) == (5, 10, 60)
    assert (tree.nodes, tree.pool) == (60, 510)
    assert DynamicTree(depth=8, k=10, drafted=59).pool == 710  # EAGLE-3's, --depth 7


@pytest.mark.parametrize("value", [1.5, -1, "3"])
def test_sizes_of_dynamic_trees_are_whole_numbers(value) -> None:
    with pytest.raises(ValueError, match=re.escape(f"tree k={value!r}: must be a whole number")):
        DynamicTree(k=value)


chances = st.lists(
    st.lists(st.sampled_from([0.0, 0.1, 0.3, 0.6, 1.0]), min_size=1, max_size=3),
    min_size=1,
    max_size=3,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(chances, st.integers(1, 5))
def test_best_tree_has_the_longest_expected_acceptance(
    accuracy: list[list[float]], nodes: int
) -> None:
    """Catches products over the wrong depth, and the likeliest children instead of paths. Compared
    with every closed set of paths of that size."""
    ranks = [range(len(level)) for level in accuracy]
    paths = [p for d in range(1, len(ranks) + 1) for p in itertools.product(*ranks[:d])]

    def expected(chosen) -> float:
        """Accepted tokens: the sum of the paths' chances."""
        return sum(
            float(np.prod([accuracy[d][rank] for d, rank in enumerate(path)])) for path in chosen
        )

    if nodes > len(paths):
        with pytest.raises(ValueError, match=f"nodes={nodes}: the accuracies describe only"):
            best_tree(accuracy, nodes)
        return
    tree = best_tree(accuracy, nodes)
    assert len(tree.paths) == nodes and set(tree.paths) <= set(paths)
    # Every closed set, grown by one path at a time.
    sets = {frozenset()}
    for _ in range(nodes):
        sets = {
            chosen | {path}
            for chosen in sets
            for path in paths
            if path not in chosen and (len(path) == 1 or path[:-1] in chosen)
        }
    assert expected(tree.paths) == pytest.approx(max(map(expected, sets)))
