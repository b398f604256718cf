"""Token trees of fixed shape, which a method proposes and one target pass verifies.

Node 0 is the root, the last committed token; parents come before children. The contents of the
arrays vary between rounds, but their shapes do not.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import operator
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from eagle_jax.checks import check_whole, short

ROOT = 0

# EAGLE-1's published tree: 25 drafted nodes, 4/8/8/3/2 per depth. Medusa's tree with the same name
# is a different one.
_MC_SIM_7B_63 = (
    "0 1 2 3 00 01 02 10 11 20 21 30 000 001 002 010 011 020 021 100 0000 0001 0002 00000 00001"
)

_SHORT_NAME = 32  # longest name, or list of rank paths, that a repr shows in full


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shape:
    """The form of each row's tree.

    Attributes:
        parents: [b, t] index of each node's parent; the root is its own parent.
        depth: [b, t] number of edges from the root.
        ancestors: [b, t, t] the attention mask of the target's pass over the tree:
            `ancestors[t, u]` says whether u lies on the path from the root to t, t included.
    """

    parents: Int[Array, "*b t"]
    depth: Int[Array, "*b t"]
    ancestors: Bool[Array, "*b t t"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Proposal:
    """The trees that a round verifies, one per row.

    Attributes:
        tokens: [b, t] tokens of the nodes; node 0 is the root, the last committed token.
        shape: the form of the trees.
        logits: [b, t, v] the draft's logits from which each node's token was drawn, or None. Only
            rules that use the draft's own distribution read them.
    """

    tokens: Int[Array, "b t"]
    shape: Shape
    logits: Float[Array, "b t v"] | None = None


@dataclasses.dataclass(frozen=True)
class StaticTree:
    """A tree that is fixed before decoding, given as rank paths as in EAGLE-1 and Medusa.

    The path (0, 2) is the third best child of the best child of the root. Paths are sorted by
    depth, then by rank, and every prefix of a path is a path too. Node i + 1 is `paths[i]`. For
    example, `static_tree([[0], [1], [0, 0]])` is a chain of 2 with one sibling:

        root 0 --- 1 (0,) --- 3 (0, 0)
              \\-- 2 (1,)
    """

    paths: tuple[tuple[int, ...], ...]

    def __repr__(self) -> str:
        """Returns a short, unique text: the name, the paths, or the size and a checksum."""
        name = tree_name(self)
        if len(name) > _SHORT_NAME:
            check = zlib.crc32(repr(self.paths).encode())
            return f"StaticTree({self.nodes} nodes, depth {self.depth}, {check:08x})"
        return f"StaticTree({name!r})"

    @property
    def nodes(self) -> int:
        """Nodes of the tree, root included: tokens of one target pass."""
        return len(self.paths) + 1

    @property
    def depth(self) -> int:
        """Depth of the tree: length of its longest draft."""
        return max((len(path) for path in self.paths), default=0)

    @functools.cached_property
    def parents(self) -> np.ndarray:
        """[t] parent of each node."""
        index = {(): ROOT, **{path: i + 1 for i, path in enumerate(self.paths)}}
        return np.array([ROOT] + [index[path[:-1]] for path in self.paths], np.int32)

    @functools.cached_property
    def depths(self) -> np.ndarray:
        """[t] depth of each node."""
        return np.array([0] + [len(path) for path in self.paths], np.int32)

    @functools.cached_property
    def ranks(self) -> np.ndarray:
        """[t] rank of each node among its parent's candidates (0 for the root)."""
        return np.array([0] + [path[-1] for path in self.paths], np.int32)

    @functools.cached_property
    def ancestors(self) -> np.ndarray:
        """[t, t] ancestor matrix; every node counts as its own ancestor."""
        out = np.eye(self.nodes, dtype=bool)
        for node in range(1, self.nodes):
            out[node] |= out[self.parents[node]]
        return out

    def shape(self, batch: int) -> Shape:
        """Returns the same shape for every row of a batch."""

        def rows(x: np.ndarray) -> jax.Array:
            return jnp.broadcast_to(jnp.asarray(x)[None], (batch, *x.shape))

        return Shape(rows(self.parents), rows(self.depths), rows(self.ancestors))


@dataclasses.dataclass(frozen=True)
class DynamicTree:
    """EAGLE-2's tree (arXiv 2406.16858 section 4): each round grows a new one of the same size.

    Each level expands the frontier: every frontier node gets its `k` best children, and the `k`
    best of all of them by cumulative log-probability are the next frontier. At the end the tree
    keeps the best `drafted` candidates of all levels, the pool. In the official command line,
    `depth` is ours - 1 and `total-token` is ours + 1.

    Attributes:
        depth: length of the longest draft.
        k: candidates per node, and nodes per frontier.
        drafted: drafted nodes of the tree, without the root.
    """

    depth: int = 6
    k: int = 10
    drafted: int = 59

    def __post_init__(self) -> None:
        for name in ("depth", "k", "drafted"):
            check_whole(f"tree {name}", getattr(self, name))
        if self.drafted > self.pool:
            raise ValueError(
                f"tree drafted={self.drafted}: depth {self.depth} and k {self.k} find only "
                f"{self.pool} candidates; use at most that"
            )

    @property
    def nodes(self) -> int:
        """Nodes of the tree, root included: tokens of one target pass."""
        return self.drafted + 1

    @property
    def pool(self) -> int:
        """Number of candidates that the expansion finds."""
        return self.k + (self.depth - 1) * self.k**2


def rerank(
    tokens: Int[Array, "b p"],
    scores: Float[Array, "b p"],
    parents: Int[Array, "b p"],
    root: Int[Array, " b"],
    tree: DynamicTree,
) -> Proposal:
    """Returns the tree of the `tree.drafted` best candidates of a pool.

    A candidate's parent has a lower index and at least the same score, and ties go to the lower
    index. So whenever a candidate is chosen, its parent is chosen too.

    Args:
        tokens, scores: token and score of every candidate.
        parents: index + 1 of each candidate's parent, 0 for the root.
        root: the root's token.
        tree: the size of the tree.
    """

    def one_row(tokens, scores, parents, root):
        chosen = kept(scores, tree)
        place = jnp.zeros(tree.pool + 1, jnp.int32).at[chosen + 1].set(jnp.arange(1, tree.nodes))
        above = jnp.concatenate([jnp.zeros(1, jnp.int32), place[parents[chosen]]])
        return jnp.concatenate([root[None], tokens[chosen]]), grow(above, tree.depth)

    tokens, shape = jax.vmap(one_row)(tokens, scores, parents, root)
    return Proposal(tokens, shape)


def kept(scores: Float[Array, " p"], tree: DynamicTree) -> Int[Array, " n"]:
    """Returns the indices of the best candidates of one row's pool, parents first."""
    # `top_k` ranks -0.0 below 0.0, so a child could be chosen without its parent.
    _, best = jax.lax.top_k(jnp.where(scores == 0, 0.0, scores), tree.drafted)
    return jnp.sort(best)


def grow(parents: Int[Array, " t"], depth: int) -> Shape:
    """Returns the shape of one row's tree from every node's parent (the root is its own)."""
    own = jnp.eye(parents.shape[0], dtype=bool)
    ancestors = own
    for _ in range(depth):
        ancestors = own | ancestors[parents]
    return Shape(parents, jnp.sum(ancestors, axis=1, dtype=jnp.int32) - 1, ancestors)


def best_tree(accuracy: Sequence[Sequence[float]], nodes: int) -> StaticTree:
    """Returns the static tree of `nodes` drafted nodes with the highest expected τ.

    The probability that a path is accepted is the product of its accuracies; the tree takes the
    likeliest paths.

    Args:
        accuracy: `accuracy[d][r]`, how often the candidate of rank r is right at depth d + 1, given
            that its parent is right.
        nodes: drafted nodes, without the root.
    """
    chosen: list[tuple[int, ...]] = []
    waiting: list[tuple[float, tuple[int, ...]]] = [
        (-float(share), (rank,)) for rank, share in enumerate(accuracy[0])
    ]
    heapq.heapify(waiting)
    while len(chosen) < nodes:
        if not waiting:
            raise ValueError(f"nodes={nodes}: the accuracies describe only {len(chosen)} paths")
        chance, path = heapq.heappop(waiting)
        chosen.append(path)
        if len(path) < len(accuracy):
            for rank, share in enumerate(accuracy[len(path)]):
                heapq.heappush(waiting, (chance * float(share), (*path, rank)))
    return static_tree(chosen)


# Most nodes of a proposal, including the root: trees are built node by node, and masks are [t, t].
MOST_NODES = 1024
# Most levels of a tree that is drafted level by level. The compiled program contains every level
# separately, so compile time grows with their number.
MOST_LEVELS = 64


def check_levels(name: str, levels: int) -> None:
    """Raises ValueError if a tree that is drafted level by level has too many levels."""
    if levels > MOST_LEVELS:
        raise ValueError(
            f"{name}={levels}: every level is compiled by itself, and at most {MOST_LEVELS} are "
            "allowed; use fewer"
        )


def check_tree(tree: Any) -> None:
    """Raises ValueError unless `tree` is a static or a dynamic tree."""
    if not isinstance(tree, StaticTree | DynamicTree):
        example = f"named_tree({tree!r})" if isinstance(tree, str) else "chain(3)"
        raise ValueError(f"tree={short(tree)}: is not a tree; give one such as {example}")


def static_tree(paths: Iterable[Sequence[int]]) -> StaticTree:
    """Returns a checked tree from rank paths in any order, which must include all prefixes."""
    try:
        given = [tuple(operator.index(rank) for rank in path) for path in paths]
    except TypeError as error:
        raise ValueError(f"tree={paths!r}: give paths of whole numbers, [[0], [0, 0]]") from error
    known = set(given)
    chosen = sorted(known, key=lambda path: (len(path), path))
    if len(chosen) != len(given):
        raise ValueError(f"tree={given}: a path stands twice; give each once")
    for path in chosen:
        if not path or min(path) < 0:
            raise ValueError(f"tree path {path}: must hold ranks of 0 or more, and at least one")
        if path[:-1] and path[:-1] not in known:
            raise ValueError(f"tree path {path}: its parent {path[:-1]} is missing; add it")
    return StaticTree(tuple(chosen))


def chain(depth: int) -> StaticTree:
    """Returns a chain: `depth` drafted tokens in sequence, each the best candidate."""
    if not isinstance(depth, int) or isinstance(depth, bool) or not 1 <= depth < MOST_NODES:
        raise ValueError(f"chain depth={depth!r}: must be from 1 to {MOST_NODES - 1}")
    return static_tree([(0,) * d for d in range(1, depth + 1)])


MC_SIM_7B_63 = static_tree([[int(rank) for rank in word] for word in _MC_SIM_7B_63.split()])


def named_tree(name: str) -> StaticTree | DynamicTree:
    """Returns the tree of a name; the error message at the end lists the forms of names."""
    if name == "mc_sim_7b_63":
        return MC_SIM_7B_63
    if name.startswith("chain-") and name.removeprefix("chain-").isdecimal():
        return chain(int(name.removeprefix("chain-")))
    sizes = name.removeprefix("dynamic-").split("-")
    if name.startswith("dynamic-") and len(sizes) == 3 and all(map(str.isdecimal, sizes)):
        return DynamicTree(*map(int, sizes))
    words = name.split()
    if words and all(word.isascii() and word.isdecimal() for word in words):
        return static_tree([[int(rank) for rank in word] for word in words])
    raise ValueError(
        f"tree={name!r}: unknown; use mc_sim_7b_63, chain-N, dynamic-DEPTH-K-DRAFTED, or rank "
        "paths such as '0 1 00 01'"
    )


def tree_name(tree: StaticTree | DynamicTree) -> str:
    """Returns the name that `named_tree` maps to `tree`; without one, its ranks as digits."""
    if isinstance(tree, DynamicTree):
        return f"dynamic-{tree.depth}-{tree.k}-{tree.drafted}"
    if tree == MC_SIM_7B_63:
        return "mc_sim_7b_63"
    if tree.depth and tree == chain(tree.depth):
        return f"chain-{tree.depth}"
    return " ".join("".join(map(str, path)) for path in tree.paths)
