"""Safetensors files: bit-exact, agreeing with the library, and never half-written."""

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from eagle_jax.checkpoint import safetensors as st


def tensors(dtype) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "matrix": rng.normal(size=(5, 3)).astype(dtype),
        "view": rng.normal(size=(4, 6)).astype(dtype).T[1:],
        "scalar": np.array(2.5, dtype),
        "empty": np.zeros((0, 3), dtype),
        "flag": np.array([True]),
    }


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_round_trip_is_bit_exact_and_the_library_agrees(tmp_path, dtype):
    path = tmp_path / "a.safetensors"
    st.write(path, tensors(dtype), {"format": "pt"})
    assert_same(st.read(path), tensors(dtype))
    assert_same(safetensors.numpy.load_file(path), tensors(dtype))
    with safetensors.safe_open(path, framework="np") as file:
        assert file.metadata() == {"format": "pt"}
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_reads_what_the_library_writes(tmp_path):
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}
    safetensors.numpy.save_file(arrays, tmp_path / "a")
    assert_same(st.read(tmp_path / "a"), arrays)


@pytest.mark.parametrize("keep", [0, 5, 30, -1])
def test_truncated(tmp_path, keep):
    path = tmp_path / "a.safetensors"
    st.write(path, tensors(np.float32))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"a\.safetensors: truncated .* again$"):
        st.read(path)


def test_corrupt(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"\xff" * 200)
    with pytest.raises(ValueError, match="corrupt"):
        st.read(path)


def test_missing(tmp_path):
    with pytest.raises(ValueError, match="none: no such file"):
        st.read(tmp_path / "none")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    st.write(path, tensors(np.float32))

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(st.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        st.write(path, {"other": np.ones(3)})
    assert_same(st.read(path), tensors(np.float32))
    assert len(list(tmp_path.iterdir())) == 1


def test_unknown_dtype(tmp_path):
    with pytest.raises(ValueError, match="c has dtype complex128; cast"):
        st.write(tmp_path / "a", {"c": np.zeros(1, complex)})
    assert not list(tmp_path.iterdir())
