"""Mesh and placement rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from eagle_jax import sharding, testing
from eagle_jax.models.linear import Embedding


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def specs(tree, **keywords):
    return jax.tree.map(lambda s: s.spec, tree, **keywords)


def test_mesh_splits_devices():
    assert dict(sharding.make_mesh(4).shape) == {"data": 2, "fsdp": 4, "expert": 1, "tensor": 1}
    mesh = sharding.make_mesh(2, tensor=4)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "expert": 1, "tensor": 4}
    # Neighbours form a tensor group.
    assert mesh.devices[0, 0, 0].tolist() == jax.devices()[:4]
    three = sharding.make_mesh(devices=jax.devices()[:3])
    assert dict(three.shape) == {"data": 3, "fsdp": 1, "expert": 1, "tensor": 1}


@pytest.mark.parametrize("axis", ["fsdp", "tensor", "expert"])
@pytest.mark.parametrize(
    ("size", "said"),
    [
        (0, "a whole number above 0"),
        (-1, "a whole number above 0"),
        (3, "divide the number of devices, 8"),
        (16, "divide the number of devices, 8"),
    ],
)
def test_every_axis_must_divide(axis, size, said):
    with pytest.raises(ValueError, match=f"{axis}={size}: must.* {said}"):
        sharding.make_mesh(**{axis: size})


def test_axes_together_must_divide():
    with pytest.raises(ValueError, match="fsdp=4, tensor=4: 16 devices together, which do not"):
        sharding.make_mesh(4, tensor=4)


def test_batch_must_divide():
    mesh = sharding.make_mesh(2)
    sharding.check_batch(mesh, 16)
    with pytest.raises(ValueError, match="batch_size=12: must be a multiple of 8"):
        sharding.check_batch(mesh, 12)
    # Devices of a tensor group have the same rows.
    sharding.check_batch(sharding.make_mesh(2, tensor=2), 12)
    assert sharding.batch_sharding(mesh, 16).spec == P(("data", "fsdp"))
    assert sharding.batch_sharding(mesh, 3).is_fully_replicated


def test_stored_weights_are_cut_along_their_largest_divisible_axis():
    tree = {
        "wide": shape(8, 20),
        "odd": shape(8, 21),
        "square": shape(8, 8),
        "scale": shape(12),
        "none": shape(3, 5),
        "scalar": shape(),
    }
    found = specs(sharding.weight_shardings(sharding.make_mesh(4), tree))
    cut = ("fsdp",)
    assert found == {
        "wide": P(None, cut),
        "odd": P(cut, None),
        "square": P(cut, None),
        "scale": P(cut),
        "none": P(),
        "scalar": P(),
    }
    for mesh, stored in ((sharding.make_mesh(), True), (sharding.make_mesh(4), False)):
        places = sharding.weight_shardings(mesh, tree, stored=stored)
        assert all(place.is_fully_replicated for place in jax.tree.leaves(places))


def test_one_token_is_looked_up_as_two_where_the_table_is_cut():
    """Catches a lookup that XLA makes a slice of: GPUs gather the whole table for that, though CPUs
    and TPUs do not (test_aot.py compiles it, where JAX's CUDA plugin is installed)."""
    mesh = sharding.make_mesh(tensor=2, devices=jax.devices()[:2])
    embedding = Embedding(8, 4, rngs=nnx.Rngs(0))

    def looked_up(tokens: jax.Array) -> str:
        return str(jax.make_jaxpr(embedding)(tokens))

    token = jnp.full((1, 1), 5, jnp.int32)
    assert "f32[1,2,4]" not in looked_up(token)
    with sharding.using(mesh):
        assert "f32[1,2,4] = gather" in looked_up(token)
        got = jax.jit(embedding)(token)
    np.testing.assert_array_equal(got, embedding(token))


def test_programs_over_several_devices_run_one_at_a_time():
    """Catches threads whose programs wait for each other's devices."""
    mesh = sharding.make_mesh(tensor=2, devices=jax.devices()[:2])
    alone = sharding.make_mesh(devices=jax.devices()[:1])
    x = np.zeros(4)
    assert sharding.at_a_time({"x": jax.device_put(x, sharding.replicated(mesh))}, 4) == 1
    assert sharding.at_a_time({"x": jax.device_put(x, sharding.replicated(alone))}, 4) == 4
    assert sharding.at_a_time({"x": jax.device_put(x)}, 4) == 4


def test_weights_are_cut_by_name_over_tensor_groups():
    """Catches a matrix whose other axis is cut: results would have to be exchanged."""
    tree = {
        "layers.0.self_attn.q_proj.kernel": shape(32, 64),
        "layers.0.self_attn.v_proj.bias": shape(64),
        "layers.0.self_attn.o_proj.kernel": shape(64, 32),
        "layers.0.mlp.gate_up_proj.kernel": shape(32, 2, 48),
        "layers.0.mlp.up_proj.kernel": shape(32, 48),
        "layers.0.mlp.down_proj.kernel": shape(48, 32),
        "layers.1.mlp.experts.gate_up_proj.kernel": shape(8, 32, 2, 48),
        "layers.1.mlp.experts.down_proj.kernel": shape(8, 48, 32),
        "layers.1.mlp.gate.kernel": shape(32, 8),
        "embed_tokens.embedding": shape(60, 32),
        "lm_head.kernel": shape(32, 60),
        "norm.scale": shape(32),
    }
    mesh = sharding.make_mesh(2, tensor=2, expert=2)
    used = specs(sharding.weight_shardings(mesh, tree, stored=False))
    t, x = ("tensor",), ("expert", "tensor")
    layers = {name.split(".", 2)[2]: cut for name, cut in used.items() if "layers" in name}
    assert layers == {
        "self_attn.q_proj.kernel": P(None, t),
        "self_attn.v_proj.bias": P(t),
        "self_attn.o_proj.kernel": P(t, None),
        "mlp.gate_up_proj.kernel": P(None, None, t),
        "mlp.up_proj.kernel": P(None, t),
        "mlp.down_proj.kernel": P(t, None),
        "mlp.experts.gate_up_proj.kernel": P(x, None, None, None),
        "mlp.experts.down_proj.kernel": P(x, None, None),
        "mlp.gate.kernel": P(),
    }
    assert used["embed_tokens.embedding"] == P(t, None)
    assert used["lm_head.kernel"] == P(None, t)
    assert used["norm.scale"] == P()
    # Stored, the same axes, and the largest of the others over fsdp; optimizer state lies alike.
    stored = sharding.weight_shardings(mesh, {"adam": {"mu": tree}})["adam"]["mu"]
    assert stored["layers.0.self_attn.q_proj.kernel"].spec == P(("fsdp",), t)
    assert stored["layers.1.mlp.experts.down_proj.kernel"].spec == P(x, ("fsdp",), None)
    assert stored["norm.scale"].spec == P(("fsdp",))


def test_what_cannot_be_cut_is_named():
    mesh = sharding.make_mesh(tensor=8)
    with pytest.raises(ValueError, match=r"q_proj.kernel: axis 1 of \(32, 60\) cannot be cut in"):
        sharding.weight_shardings(mesh, {"q_proj.kernel": shape(32, 60)})
    whole = sharding.weight_shardings(mesh, {"lm_head.kernel": shape(32, 61)})
    assert whole["lm_head.kernel"].is_fully_replicated
    with pytest.raises(ValueError, match="num_attention_heads=4: cannot be cut into 8 equal parts"):
        sharding.check_tensor(mesh, [testing.tiny_target()])
    target = testing.tiny_target(
        vocab_size=64,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_experts=12,
        num_experts_per_tok=2,
    )
    with pytest.raises(ValueError, match=r"num_experts=12: .* \(expert x tensor of the mesh\)"):
        sharding.check_tensor(mesh, [target])


def test_rules_are_checked():
    assert sharding.spec("batch", None) == P(("data", "fsdp"), None)
    with pytest.raises(ValueError, match="unknown"):
        sharding.spec("bach")
    for pair in (("batch", "shard"), ("heads", "vocab"), ("experts", "mlp")):
        with pytest.raises(ValueError, match="one mesh axis"):
            sharding.spec(*pair)


def test_constrain_cuts_what_divides():
    mesh = sharding.make_mesh(2, tensor=2)

    @jax.jit
    def place(x):
        with sharding.using(mesh):
            return sharding.constrain(x, "batch", None, "heads")

    x = jax.device_put(jnp.arange(4 * 3 * 6.0).reshape(4, 3, 6), sharding.replicated(mesh))
    assert place(x).sharding.spec == P(("data", "fsdp"), None, ("tensor",))
    np.testing.assert_array_equal(place(x), x)
    assert place(x[:3, :, :5]).sharding.is_fully_replicated
    assert sharding.constrain(x, "batch") is x  # no mesh in use


def test_every_process_reads_its_share():
    assert sharding.batch_share(sharding.make_mesh(2, tensor=4)) == (0, 1)
