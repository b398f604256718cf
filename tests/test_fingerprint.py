"""Fingerprints tell apart what must not be mixed, and nothing else."""

import dataclasses
import hashlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eagle_jax import fingerprint, sharding
from eagle_jax.layout import Layout
from eagle_jax.testing import tiny_params


def test_weights_configurations_and_layouts_count() -> None:
    """Catches a changed norm, matrix, draft, layout or configuration that nobody notices."""
    params = tiny_params(seed=3)
    norm, matrix = params.target["norm.scale"], params.target["layers.1.mlp.up_proj.kernel"]
    others = [
        tiny_params(seed=4),
        params.with_draft("eagle"),
        dataclasses.replace(params, target={**params.target, "norm.scale": norm.at[-1].add(1)}),
        dataclasses.replace(
            params,
            target={**params.target, "layers.1.mlp.up_proj.kernel": matrix.at[0, 0].add(1)},
        ),
        dataclasses.replace(params, layout=Layout(gate_up_fused=True)),
        dataclasses.replace(
            params, target_config=dataclasses.replace(params.target_config, rope_theta=5e4)
        ),
    ]
    found = {fingerprint.of_params(other) for other in (params, *others)}
    assert len(found) == 1 + len(others)
    same = dataclasses.replace(params, directory="elsewhere", tokenizer=None)
    assert fingerprint.of_params(same) == fingerprint.of_params(params)


def test_training_state_by_its_words() -> None:
    """Catches a flipped bit, arrays that changed places, and a sum that depends on the mesh."""
    state = {"a": jnp.arange(8, dtype=jnp.float32), "b": jnp.arange(8, dtype=jnp.float32) + 1}
    whole = fingerprint.of_arrays(state)
    assert fingerprint.of_arrays({"a": state["b"], "b": state["a"]}) != whole
    flipped = np.asarray(state["a"]).view(np.uint32).copy()
    flipped[5] ^= 1 << 7
    assert fingerprint.of_arrays({**state, "a": jnp.asarray(flipped.view(np.float32))}) != whole
    mesh = sharding.make_mesh(2, devices=jax.devices()[:2])
    parts = jax.device_put(state, sharding.batch_sharding(mesh))
    assert fingerprint.of_arrays(parts) == whole


@pytest.mark.parametrize("size", [1000, 64 * 2**20 + 1])
def test_weight_files_by_size_and_samples(tmp_path, size) -> None:
    """Catches a file that is cut, renamed or trained further, and other files that count."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(size))
    before = fingerprint.of_weight_files(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert fingerprint.of_weight_files(tmp_path) == before
    file.write_bytes(bytes(size - 1))
    assert fingerprint.of_weight_files(tmp_path) != before
    file.write_bytes(b"1" + bytes(size - 1))
    assert fingerprint.of_weight_files(tmp_path) != before
    file.write_bytes(bytes(size))
    file.rename(tmp_path / "other.safetensors")
    assert fingerprint.of_weight_files(tmp_path) != before


def test_files_and_small_values(tmp_path) -> None:
    """Catches another hash than the one that manifests of today hold."""
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    assert fingerprint.of_file(file) == hashlib.sha256(b"abc").hexdigest()
    assert fingerprint.of_texts("ab", b"c") == hashlib.sha256(b"abc").hexdigest()[:32]
    assert fingerprint.of_json({"b": 1, "a": 2}) == fingerprint.of_json({"a": 2, "b": 1})
    assert fingerprint.of_json({"a": 2}) != fingerprint.of_json({"a": 1})


def test_the_import_is_light() -> None:
    """Catches an import that takes a second."""
    code = "import sys, eagle_jax.fingerprint, eagle_jax.hardware\n"
    code += "print({'jax', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
