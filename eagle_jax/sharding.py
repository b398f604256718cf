"""The device mesh, and the tables that map logical axes of arrays to mesh axes.

Each `data` group holds a copy of the weights and processes a share of the batch. The devices of an
`fsdp` group also process a share of the batch each, but split one copy of weights and optimizer
state; a pass gathers the weights it needs. The devices of a `tensor` group process the same rows,
each with its own heads, feed-forward columns and vocabulary entries; two all-reduces per layer
combine their results. The devices of an `expert` group hold different experts of a layer; for a
model without experts they all do the same work.

Other modules do not name mesh axes: they describe arrays by logical axes.
"""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from eagle_jax.checks import check_whole
from eagle_jax.config import DraftConfig

T = TypeVar("T")

Logical = tuple[str | None, ...]  # logical axes of an array; further axes are not sharded

DATA, FSDP, EXPERT, TENSOR = "data", "fsdp", "expert", "tensor"
AXES = (DATA, FSDP, EXPERT, TENSOR)  # the last varies fastest: its devices communicate most

# Logical axis -> mesh axes. "shard" is the axis along which fsdp splits a stored weight; the axis
# is gathered when the weight is used.
RULES: dict[str, tuple[str, ...]] = {
    "batch": (DATA, FSDP),
    "heads": (TENSOR,),
    "mlp": (TENSOR,),
    "vocab": (TENSOR,),
    "experts": (EXPERT, TENSOR),
    "shard": (FSDP,),
}

# Name patterns of weights -> logical axes; the first match is taken. All other weights are
# replicated within a tensor group.
WEIGHTS: dict[str, tuple[str | None, ...]] = {
    "*experts.gate_up_proj.kernel": ("experts", None, None, None),
    "*experts.down_proj.kernel": ("experts", None, None),
    "*[qkv]_proj.kernel": (None, "heads"),
    "*[qkv]_proj.bias": ("heads",),
    "*o_proj.kernel": ("heads", None),
    "*gate_up_proj.kernel": (None, None, "mlp"),
    "*gate_proj.kernel": (None, "mlp"),
    "*up_proj.kernel": (None, "mlp"),
    "*down_proj.kernel": ("mlp", None),
    "*embed_tokens.embedding": ("vocab", None),
    "*lm_head.kernel": (None, "vocab"),
    # Scales of int8 kernels are sharded like the outputs that they belong to.
    "*experts.gate_up_proj.kernel_scale": ("experts", None, None),
    "*experts.down_proj.kernel_scale": ("experts", None),
    "*[qkv]_proj.kernel_scale": ("heads",),
    "*gate_up_proj.kernel_scale": (None, "mlp"),
    "*gate_proj.kernel_scale": ("mlp",),
    "*up_proj.kernel_scale": ("mlp",),
    "*lm_head.kernel_scale": ("vocab",),
}


def make_mesh(
    fsdp: int = 1,
    *,
    tensor: int = 1,
    expert: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Returns a (data, fsdp, expert, tensor) mesh over `devices` (by default all devices).

    The size of the data axis is the number of devices over the product of the other three.

    Raises:
        ValueError: the product of the axes does not divide the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {FSDP: fsdp, EXPERT: expert, TENSOR: tensor}
    for name, size in sizes.items():
        check_whole(name, size)
        if len(devices) % size:
            raise ValueError(f"{name}={size}: must divide the number of devices, {len(devices)}")
    group = fsdp * expert * tensor
    if len(devices) % group:
        sizes_said = ", ".join(f"{name}={size}" for name, size in sizes.items() if size > 1)
        raise ValueError(
            f"{sizes_said}: {group} devices together, which do not divide {len(devices)}; "
            "make one of them smaller"
        )
    shape = (len(devices) // group, fsdp, expert, tensor)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def decoding_mesh(tensor: int, expert: int = 1) -> Mesh | None:
    """Returns a mesh of all devices in groups of `tensor` x `expert`, or None.

    None means that one device decodes alone: a single process with `tensor` 0 and `expert` 1.
    """
    check_whole("tensor", tensor, 0)
    check_whole("expert", expert)
    if not tensor and expert == 1 and jax.process_count() == 1:
        return None
    return make_mesh(tensor=max(tensor, 1), expert=expert)


def spec(*logical: str | None) -> P:
    """Returns the PartitionSpec of an array with these logical axes (None: not sharded).

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
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, P())


def mesh_parts(mesh: Mesh | AbstractMesh, logical: str) -> int:
    """Returns the number of parts into which a mesh splits a logical axis."""
    return int(np.prod([mesh.shape[axis] for axis in RULES[logical]]))


def batch_sharding(mesh: Mesh, rows: int | None = None) -> NamedSharding:
    """Returns a sharding of the leading axis over data and fsdp groups.

    If the groups do not divide `rows`, the array is replicated.
    """
    if rows is not None and rows % mesh_parts(mesh, "batch"):
        return replicated(mesh)
    return NamedSharding(mesh, spec("batch"))


def check_batch(mesh: Mesh, batch_size: int) -> None:
    """Raises ValueError unless every group of devices gets the same number of rows."""
    if batch_size % mesh_parts(mesh, "batch"):
        raise ValueError(
            f"batch_size={batch_size}: must be a multiple of {mesh_parts(mesh, 'batch')}, the "
            "groups of devices with rows of their own"
        )


def batch_share(mesh: Mesh) -> tuple[int, int]:
    """Returns the index of the batch part that this process reads, and the number of parts.

    Processes of one tensor group read the same part.

    Raises:
        ValueError: the processes' parts are not equal slices of the batch.
    """
    groups = mesh_parts(mesh, "batch")
    places = batch_sharding(mesh).addressable_devices_indices_map((groups,))
    own = sorted({range(groups)[index[0]].start for index in places.values() if index})
    count = groups // max(1, len(own))
    if own != list(range(own[0], own[0] + len(own))) or groups % len(own) or own[0] % len(own):
        raise ValueError(
            f"mesh {dict(mesh.shape)}: this process would read rows of groups {own}, which is no "
            "equal slice of the batch; make fsdp x expert x tensor a multiple or a divisor of the "
            "devices of a process"
        )
    return own[0] // len(own), count


def mesh_of(tree: Any) -> Mesh | None:
    """Returns the mesh of a tree's first array if `make_mesh` made it, else None."""
    for leaf in jax.tree.leaves(tree):
        place = getattr(leaf, "sharding", None)
        if isinstance(place, NamedSharding) and isinstance(place.mesh, Mesh):
            return place.mesh if set(place.mesh.axis_names) == set(AXES) else None
        return None
    return None


def at_a_time(tree: Any, threads: int) -> int:
    """Returns how many threads may run programs on a tree's arrays at the same time.

    With several devices only one: two programs could each wait for a device that the other holds.
    """
    mesh = mesh_of(tree)
    return threads if mesh is None or mesh.size == 1 else 1


def using(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """Returns a context in which traced code (`constrain`, for one) uses this mesh."""
    if mesh is None:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def over_several() -> bool:
    """Returns whether the code being traced is for a whole mesh, to be partitioned by XLA."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1 and not mesh.are_all_axes_manual


def constrain(x: T, *logical: str | None) -> T:
    """Returns `x` sharded along these logical axes, or unchanged if no mesh is in use.

    Axes that are not named are not sharded, nor are axes that the mesh does not divide.
    """
    if not over_several():
        return x
    mesh = jax.sharding.get_abstract_mesh()

    def one(array: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(array, _fitting(mesh, array.shape, logical))

    return jax.tree.map(one, x)


def placed(mesh: Mesh, shape: tuple[int, ...], *logical: str | None) -> NamedSharding:
    """Returns the sharding that `constrain` gives an array of this shape."""
    return NamedSharding(mesh, _fitting(mesh, shape, logical))


def _fitting(
    mesh: Mesh | AbstractMesh, shape: tuple[int, ...], logical: tuple[str | None, ...]
) -> P:
    fitting = [
        name if name is not None and size % mesh_parts(mesh, name) == 0 else None
        for name, size in zip(logical, shape, strict=False)  # only leading axes have names
    ]
    return spec(*fitting)


def parts_of(logical: str, size: int) -> int:
    """Returns the number of parts into which the mesh in use splits an axis of this size, or 1."""
    parts = mesh_parts(jax.sharding.get_abstract_mesh(), logical) if over_several() else 1
    return 1 if size % parts else parts


def on_each_device(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    axes: tuple[Logical, ...],
    results: tuple[Logical, ...],
    *,
    weights: Mapping[str, jax.Array] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Any:
    """Runs `function` on each device of the mesh in use and returns the assembled results.

    Each device gets its own parts of the arrays and communicates only by `all_reduce`. If the mesh
    axes of a logical axis do not divide its size, no axis is sharded over these mesh axes.

    Args:
        function: called with `weights` (if given) and `args`; returns a tree of arrays, or, for
            several `results`, a tuple of that many trees.
        args: trees of arrays.
        axes, results: leading logical axes of the arrays of each argument and each result.
        weights: weights by name, sharded as a pass uses them.
        sizes: sizes of logical axes that are part of a larger axis of a weight.
    """
    mesh = jax.sharding.get_abstract_mesh()
    named = {name: _logical(name, x) for name, x in (weights or {}).items()}
    known = [
        (x.shape, names)
        for arg, names in zip(args, axes, strict=True)
        for x in jax.tree.leaves(arg)
    ]
    known += [(x.shape, named[name]) for name, x in (weights or {}).items()]
    known += [((size,), (name,)) for name, size in (sizes or {}).items()]
    whole: set[str] = set()
    for shape, names in known:
        for size, name in zip(shape, names, strict=False):
            if name is not None and size % mesh_parts(mesh, name):
                whole |= set(RULES[name])

    def place(names: Logical) -> P:
        return spec(*(None if name is None or whole & set(RULES[name]) else name for name in names))

    places: list[Any] = [
        jax.tree.map(lambda _, names=names: place(names), arg)
        for arg, names in zip(args, axes, strict=True)
    ]
    if weights is not None:
        args = (weights, *args)
        places.insert(0, {name: place(names) for name, names in named.items()})
    found = [place(names) for names in results]
    out = tuple(found) if len(found) > 1 else found[0]
    # Kernels do not declare over which mesh axes their results vary, so JAX cannot check it.
    run = jax.shard_map(function, in_specs=tuple(places), out_specs=out, check_vma=False)
    return run(*args)


def all_reduce(x: T, logical: str) -> T:
    """Returns the sum over the devices that split this axis; for use inside `on_each_device`."""
    return jax.lax.psum(x, RULES[logical])


def check_tensor(mesh: Mesh, configs: Iterable[DraftConfig]) -> None:
    """Checks that models can be sharded over the tensor and expert groups.

    Raises:
        ValueError: a group does not divide a size of a model; the message names it.
    """
    for config in configs:
        needed = {
            "num_attention_heads": "heads",
            "num_key_value_heads": "heads",
            "intermediate_size": "mlp",
        }
        if getattr(config, "num_experts", 0):
            needed |= {"num_experts": "experts"}
        for field, logical in needed.items():
            size, parts = getattr(config, field, 0), mesh_parts(mesh, logical)
            if size % parts:
                axes = " x ".join(RULES[logical])
                raise ValueError(
                    f"{field}={size}: cannot be cut into {parts} equal parts ({axes} of the mesh); "
                    "make the mesh's axis a divisor of it"
                )


def _logical(name: str, leaf: Any) -> tuple[str | None, ...]:
    rank = len(leaf.shape)
    for pattern, axes in WEIGHTS.items():
        if fnmatch.fnmatchcase(name, pattern) and len(axes) == rank:
            if leaf.dtype == np.int8:  # int8 matrices have the inputs last (`models.quantize`)
                at = int(axes[0] == "experts")
                return (*axes[:at], *axes[at + 1 :], axes[at])
            return axes
    return (None,) * rank


def _weight(mesh: Mesh, name: str, leaf: Any, *, stored: bool) -> NamedSharding:
    """Returns the sharding of a weight by its name, over tensor and expert groups.

    A stored weight is also split over fsdp, along the largest remaining axis that fsdp divides (the
    first one, if several are equal).
    """
    axes = list(_logical(name, leaf))
    for i, (logical, size) in enumerate(zip(axes, leaf.shape, strict=True)):
        if logical == "vocab" and size % mesh_parts(mesh, logical):
            axes[i] = None  # vocabularies may have odd sizes; all other sizes must divide
        elif logical is not None and size % mesh_parts(mesh, logical):
            raise ValueError(
                f"{name}: axis {i} of {tuple(leaf.shape)} cannot be cut into "
                f"{mesh_parts(mesh, logical)} equal parts ({' x '.join(RULES[logical])} of the "
                "mesh); make the mesh's axis a divisor of it"
            )
    axes = [name if name is not None and mesh_parts(mesh, name) > 1 else None for name in axes]
    parts = mesh_parts(mesh, "shard")
    free = [i for i, n in enumerate(leaf.shape) if axes[i] is None and n % parts == 0 and n > 0]
    if stored and parts > 1 and free:
        axes[max(free, key=lambda i: (leaf.shape[i], -i))] = "shard"
    return NamedSharding(mesh, spec(*axes) if any(axes) else P())


def weight_shardings(mesh: Mesh, tree: Any, *, stored: bool = True) -> Any:
    """Returns the shardings of a pytree of weights or optimizer state (arrays or their shapes).

    Args:
        mesh: a mesh of `make_mesh`.
        tree: a pytree with dictionaries by parameter name, at any depth.
        stored: return the shardings for storage, split over fsdp; otherwise those for a pass, whole
            within an fsdp group.

    Raises:
        ValueError: a weight cannot be sharded as the tables say; the message names it.
    """

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        keys = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        return _weight(mesh, str(keys[-1]) if keys else "", leaf, stored=stored)

    return jax.tree_util.tree_map_with_path(place, tree)


def put(mesh: Mesh | None, tree: Any) -> Any:
    """Places host arrays, equal in all processes, whole on every device, and returns them."""
    return jax.device_put(tree, None if mesh is None else replicated(mesh))
