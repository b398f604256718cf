"""Names and shapes of a model's parameters, in memory and on disk.

In memory, parameters are a flat dictionary with Flax names such as `layers.0.mlp.up_proj.kernel`,
of shape `[in, out]`. On disk a kernel is called `weight` and is transposed. Shapes are taken from
the module itself; each drafter defines its own names on disk (`DraftFiles.disk_name`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

from eagle_jax.config import DraftConfig
from eagle_jax.drafters import registry
from eagle_jax.layout import PLAIN, Layout

Shape = tuple[int, ...]

LEAVES = {
    "kernel": ("weight", True),
    "embedding": ("weight", False),
    "scale": ("weight", False),
    "bias": ("bias", False),
}
"""Flax leaf -> its name on disk, and whether it is transposed there."""

TABLE = "d2t"
"""The one array of a model that is a table of token ids, not a weight."""


def shapes(config: DraftConfig) -> dict[str, Shape]:
    """Returns name and shape of every array in a configuration's files.

    This is the layout of files and of training, in which every expert and every projection is a
    separate array. A draft's `d2t` is included.
    """
    return registry.by_config(config).checkpoint().shapes(config)


def module_shapes(
    module: Callable[..., Any], config: Hashable, layout: Layout = PLAIN
) -> dict[str, Shape]:
    """Returns name and shape of every parameter and table of a module without allocating it."""
    return dict(_module_shapes(module, config, layout))


@functools.lru_cache(maxsize=256)
def _module_shapes(
    module: Callable[..., Any], config: Hashable, layout: Layout
) -> dict[str, Shape]:
    from eagle_jax.models import param_shapes  # imports JAX

    return {name: tuple(leaf.shape) for name, leaf in param_shapes(module, config, layout).items()}


def renamed_leaf(name: str) -> tuple[str, bool]:
    """Returns a Flax name with its last part renamed as on disk, and whether disk transposes it."""
    stem, leaf = name.rsplit(".", 1) if "." in name else ("", name)
    leaf, transposed = LEAVES.get(leaf, (leaf, False))
    return f"{stem}.{leaf}" if stem else leaf, transposed


def on_disk(config: DraftConfig) -> dict[str, tuple[str, bool]]:
    """Returns, by Flax name, every weight's name on disk and whether it is transposed there."""
    files = registry.by_config(config).checkpoint()
    return {name: files.disk_name(config, name) for name in files.shapes(config) if name != TABLE}


def disk_shapes(config: DraftConfig) -> dict[str, Shape]:
    """Returns the shape of every weight by its name on disk."""
    expected = shapes(config)
    return {
        disk: expected[name][::-1] if transposed else expected[name]
        for name, (disk, transposed) in on_disk(config).items()
    }
