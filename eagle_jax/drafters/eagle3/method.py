"""EAGLE-3's default: the EAGLE method with this head and a deeper dynamic tree."""

from __future__ import annotations

from eagle_jax.decode.tree import DynamicTree
from eagle_jax.drafters.eagle.method import Eagle


def eagle3() -> Eagle:
    """What `method="eagle3"` stands for."""
    return Eagle(DynamicTree(depth=8), head="eagle3")
