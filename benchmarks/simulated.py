"""SIMULATED acceptance: a rule that accepts drafted tokens at random.

Rates give the probability that the best candidate at each depth is right. The probabilities of all
candidates (`chances`) and the expected tau of trees follow from them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array

from eagle_jax.decode import Eagle, Exact, best_tree
from eagle_jax.decode.acceptance import walk
from eagle_jax.decode.method import Accepted, Context, Rule
from eagle_jax.decode.sampling import position_uniform
from eagle_jax.decode.tree import Proposal, StaticTree, named_tree

RATES = {"eagle": (0.79, 0.74, 0.72, 0.73, 0.67), "eagle3": (0.80,) * 8}
_RANKS = 10  # candidates per node

Chances = tuple[tuple[float, ...], ...]


def chances(rates: Sequence[float]) -> Chances:
    """Returns `[d][r]`: the probability that the candidate of rank r at depth d + 1 is right.

    The probability is conditional on its parent being right.
    """
    out = []
    for rate in rates:
        others = [1 - rate / 2**rank for rank in range(_RANKS)]
        out.append(tuple(math.prod(others[:r]) * (1 - others[r]) for r in range(_RANKS)))
    return tuple(out)


def tree_of(name: str, likely: Chances) -> StaticTree:
    """Returns the tree that `--trees` names.

    Raises:
        ValueError: the tree is dynamic, or deeper than the number of `--rates`.
    """
    size = name.removeprefix("best-")
    if size != name and size.isdecimal() and int(size) > 1:
        return best_tree(likely, int(size) - 1)
    tree = named_tree(name)
    if not isinstance(tree, StaticTree):
        raise ValueError(f"--trees {name}: a dynamic tree follows a confidence that is random here")
    if tree.depth > len(likely):
        raise ValueError(
            f"--trees {name}: is {tree.depth} deep, and there are {len(likely)} --rates; give more"
        )
    return tree


def expected(tree: StaticTree, likely: Chances) -> float:
    """Returns the expected tau of a tree with these probabilities."""
    paths = (zip(likely, path, strict=False) for path in tree.paths)
    return 1 + sum(math.prod(of_depth[rank] for of_depth, rank in path) for path in paths)


@dataclasses.dataclass(frozen=True)
class Simulated:
    """An acceptance rule that accepts at random, whatever the target's logits are.

    Attributes:
        tree: the tree of all proposals.
        likely: probability that each candidate is right.
    """

    tree: StaticTree
    likely: Chances

    lossless: ClassVar[bool] = False
    seeded: ClassVar[bool] = False

    def __call__(
        self, proposal: Proposal, logits: Array, targets: Array, context: Context
    ) -> Accepted:
        del logits
        # One random number per position; each sibling owns an interval of [0, 1] of the length of
        # its probability.
        depths, ranks = self.tree.depths - 1, self.tree.ranks
        ends = np.pad(np.cumsum(self.likely, axis=1, dtype=np.float32), ((0, 0), (1, 0)))
        low, high = ends[None, depths, ranks], ends[None, depths, ranks + 1]
        drawn = position_uniform(context.seeds, context.length, context.longest - 1)[:, depths]
        # Targets are never negative, but the compiler does not know it. So, as with the real rule,
        # nothing can be committed before the pass has ended.
        above = jnp.take_along_axis(targets, proposal.shape.parents, 1, mode="clip")
        kept = (drawn >= low) & (drawn < high) & (above >= 0)
        return walk(proposal, kept, targets, context.longest)


@dataclasses.dataclass(frozen=True)
class Lucky(Eagle):
    """EAGLE with the simulated acceptance rule."""

    rule: Rule = Exact()
