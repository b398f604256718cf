"""Device mesh, and the one table that says which logical axis lies on which mesh axes.

Every device holds a share of the batch. The devices of one `fsdp` group share weights and
optimizer state as well; `data` groups hold copies of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

DATA, FSDP = "data", "fsdp"

# Logical axis -> mesh axes. "shard" is the one axis of a weight that is cut.
RULES: dict[str, tuple[str, ...]] = {"batch": (DATA, FSDP), "shard": (FSDP,)}


def make_mesh(fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A (data, fsdp) mesh over `devices` (all of them by default).

    Raises:
        ValueError: `fsdp` does not divide the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if fsdp < 1 or len(devices) % fsdp:
        raise ValueError(f"fsdp={fsdp}: must divide the number of devices, {len(devices)}")
    shape = (len(devices) // fsdp, fsdp)
    return jax.make_mesh(shape, (DATA, FSDP), axis_types=(AxisType.Auto,) * 2, devices=devices)


def spec(*logical: str | None) -> P:
    """Partition of an array whose axes carry these logical names (None: not cut).

    Raises:
        ValueError: an unknown name, or two axes of one array on the same mesh axis.
    """
    used: set[str] = set()
    axes: list[tuple[str, ...] | None] = []
    for name in logical:
        if name is not None and name not in RULES:
            raise ValueError(f"logical axis {name!r}: unknown, choose from {sorted(RULES)}")
        mesh_axes = RULES[name] if name is not None else ()
        if used & set(mesh_axes):
            raise ValueError(f"logical axes {logical}: two of them lie on one mesh axis")
        used |= set(mesh_axes)
        axes.append(mesh_axes or None)
    return P(*axes)


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis over all devices."""
    return NamedSharding(mesh, spec("batch"))


def check_batch(mesh: Mesh, batch_size: int) -> None:
    """Raise ValueError unless every device gets the same number of rows."""
    if batch_size % mesh.size:
        raise ValueError(f"batch_size={batch_size}: must be a multiple of {mesh.size} devices")


def _weight(mesh: Mesh, leaf: Any) -> NamedSharding:
    """`leaf` cut over fsdp along its largest axis that divides, the first of equals."""
    ways = mesh.shape[FSDP]
    divisible = [axis for axis, size in enumerate(leaf.shape) if size % ways == 0 and size > 0]
    if ways == 1 or not divisible:
        return replicated(mesh)
    cut = max(divisible, key=lambda axis: (leaf.shape[axis], -axis))
    return NamedSharding(mesh, spec(*["shard" if a == cut else None for a in range(leaf.ndim)]))


def weight_shardings(mesh: Mesh, tree: Any) -> Any:
    """Shardings of a pytree of weights or optimizer state (arrays or their shapes)."""
    return jax.tree.map(lambda leaf: _weight(mesh, leaf), tree)
