"""Tensors in files of which rows are read."""

import numpy as np
import pytest

from eagle_jax.checkpoint import lazy_tensor, safetensors
from eagle_jax.checkpoint.lazy_tensor import LazyTensor


def test_some_rows(monkeypatch):
    """Catches rows in another order, of another block, and blocks that nobody asked for."""
    monkeypatch.setattr(lazy_tensor, "_BLOCK", 4)
    whole, seen = np.arange(22).reshape(11, 2), []

    def part(start, stop):
        seen.append((start, stop))
        return whole[start:stop]

    def load():
        raise AssertionError("read as a whole")

    tensor = LazyTensor(whole.shape, whole.dtype, load, part)
    chosen = np.array([10, 1, 9, 0, 1])
    found = tensor.rows(chosen)
    assert (found.shape, found.dtype) == ((5, 2), whole.dtype) and not seen
    np.testing.assert_array_equal(found, whole[chosen])
    assert seen == [(0, 4), (8, 11)]
    assert tensor.T.shape == (2, 11) and tensor.T.T is tensor
    np.testing.assert_array_equal(tensor.T.T.rows(chosen).T, whole.T[:, chosen])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_some_rows_of_a_file(tmp_path, dtype):
    """Catches numbers of another dtype; without `part`, what torch's files are read by."""
    whole = np.random.default_rng(0).normal(size=(2100, 3)).astype(dtype)
    safetensors.write(tmp_path / "x.safetensors", {"x": whole})
    chosen = np.array([2099, 0, 1024, 1023])
    tensor = safetensors.stored(tmp_path / "x.safetensors")["x"]
    for rows in (tensor.rows(chosen), lazy_tensor.lazily(whole).rows(chosen)):
        found = np.asarray(rows)
        assert found.dtype == whole.dtype and found.tobytes() == whole[chosen].tobytes()
