"""Mesh and placement rules."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from eagle_jax import sharding


def test_mesh_splits_devices():
    assert dict(sharding.make_mesh(4).shape) == {"data": 2, "fsdp": 4}
    assert dict(sharding.make_mesh(1, jax.devices()[:3]).shape) == {"data": 3, "fsdp": 1}


@pytest.mark.parametrize("fsdp", [0, 3, 16])
def test_fsdp_must_divide(fsdp):
    with pytest.raises(ValueError, match=f"fsdp={fsdp}: must divide the number of devices, 8"):
        sharding.make_mesh(fsdp)


def test_batch_must_divide():
    mesh = sharding.make_mesh(2)
    sharding.check_batch(mesh, 16)
    with pytest.raises(ValueError, match="batch_size=12: must be a multiple of 8 devices"):
        sharding.check_batch(mesh, 12)


def test_weights_are_cut_along_their_largest_divisible_axis():
    shapes = {"wide": (8, 20), "odd": (8, 21), "square": (8, 8), "scale": (12,), "none": (3, 5)}
    tree = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    tree["scalar"] = jax.ShapeDtypeStruct((), jnp.int32)
    found = jax.tree.map(lambda s: s.spec, sharding.weight_shardings(sharding.make_mesh(4), tree))
    cut = ("fsdp",)
    assert found == {
        "wide": P(None, cut),
        "odd": P(cut, None),
        "square": P(cut, None),
        "scale": P(cut),
        "none": P(),
        "scalar": P(),
    }
    whole = sharding.weight_shardings(sharding.make_mesh(1), tree)
    assert all(place.is_fully_replicated for place in jax.tree.leaves(whole))


def test_rules_are_checked():
    assert sharding.spec("batch", None) == P(("data", "fsdp"), None)
    with pytest.raises(ValueError, match="unknown"):
        sharding.spec("bach")
    with pytest.raises(ValueError, match="one mesh axis"):
        sharding.spec("batch", "shard")
