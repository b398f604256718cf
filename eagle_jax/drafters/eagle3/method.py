"""EAGLE-3's default method: `Eagle` with the EAGLE-3 head and a deeper dynamic tree."""

from __future__ import annotations

from eagle_jax.decode.tree import DynamicTree
from eagle_jax.drafters.eagle.method import Eagle


def eagle3() -> Eagle:
    """Returns the default method for `method="eagle3"`."""
    return Eagle(DynamicTree(depth=8), head="eagle3")
