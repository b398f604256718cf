"""torch's files without torch: the same tensors as torch reads, and no code ever run."""

import errno
import io
import os
import pickle
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest
import torch
from model_directories import message

from eagle_jax.checkpoint import torch_bin


def save(path, content, **options):
    torch.save(content, path, **options)
    return path


def archive(path, pickled: bytes):
    """A file as torch writes it, around any pickle."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", pickled)
        file.writestr("a/data/0", bytes(8))
    return path


DTYPES = {
    torch.float16: np.float16,
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.int64: np.int64,
    torch.int32: np.int32,
    torch.uint8: np.uint8,
    torch.bool: np.bool_,
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_what_torch_writes(tmp_path, dtype):
    """Catches a dtype taken for another, and rows that are columns."""
    tensor = (torch.arange(6).reshape(2, 3) % 3).to(dtype)
    found = torch_bin.stored(save(tmp_path / "a.bin", {"x": tensor, "one": tensor[1, 2]}))
    assert found["x"].dtype == DTYPES[dtype] and found["x"].shape == (2, 3)
    np.testing.assert_array_equal(np.asarray(found["x"]).astype(float), tensor.double().numpy())
    assert found["one"].shape == () and np.asarray(found["one"]) == tensor[1, 2].item()


def test_views_parameters_and_state_dicts(tmp_path):
    """Catches tensors that share a storage and are read from its start or with wrong strides."""
    base = torch.arange(24.0).reshape(4, 6)
    content = OrderedDict(whole=base, turned=base.T, part=base[1:3, 2:5], every=base[:, ::2])
    content["parameter"] = torch.nn.Parameter(base[3])
    content["empty"] = torch.zeros(0, 3)
    content["spread"] = base[0, :1].expand(5)
    found = torch_bin.stored(save(tmp_path / "a.bin", content))
    assert found.keys() == content.keys()
    for name, tensor in content.items():
        array = tensor.detach().numpy()
        np.testing.assert_array_equal(np.asarray(found[name]), array, err_msg=name)
    module = torch.nn.Linear(3, 2)  # its state_dict carries metadata
    found = torch_bin.stored(save(tmp_path / "b.bin", module.state_dict()))
    np.testing.assert_array_equal(np.asarray(found["weight"]), module.weight.detach().numpy())


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    """Catches the advice to save a file again that is whole."""
    path = tmp_path / "pytorch_model.bin"
    torch.save({"x": torch.zeros(3)}, path)

    def refuse(*arguments):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(torch_bin, "open", refuse, raising=False)
    with pytest.raises(PermissionError, match="Permission denied"):
        torch_bin.stored(path)


def test_code_is_refused_and_not_run(tmp_path):
    """Catches a reader that runs what a downloaded file asks for."""
    mark = tmp_path / "mark"
    path = save(tmp_path / "a.bin", {"x": torch.ones(2), "y": Evil(mark)})
    text = message(torch_bin.stored, path)
    assert text.startswith(f"{path}: pickle with code in it (posix.mkdir): refused; save it with")
    assert not mark.exists()


@pytest.mark.parametrize(
    "name",
    ["builtins eval", "torch load", "torch._utils _rebuild_qtensor", "collections deque"]
    + ["torch.nn.modules.linear Linear", "torch.storage _load_from_bytes", "torch HalfTensor"],
)
def test_only_the_names_of_tensors_are_known(tmp_path, name):
    """Catches a list of forbidden names in place of one of allowed names."""
    module, attribute = name.split()
    pickled = f"c{module}\n{attribute}\n.".encode()
    text = message(torch_bin.stored, archive(tmp_path / "a.bin", pickled))
    assert f"pickle with code in it ({module}.{attribute}): refused" in text


def persistent(length: int, key: str = "0") -> bytes:
    """A pickle of one storage, as torch writes it."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return ("storage", torch.FloatStorage, key, "cpu", length) if obj == "me" else None

    out = io.BytesIO()
    Pickler(out, protocol=2).dump({"x": "me"})
    return out.getvalue()


@pytest.mark.parametrize("length", [3, 10**12])
def test_a_storage_that_lacks_bytes(tmp_path, length):
    """Catches tensors that end in whatever follows in the file."""
    text = message(torch_bin.stored, archive(tmp_path / "a.bin", persistent(length)))
    assert "truncated or corrupt (storage 0 lacks bytes)" in text


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_truncated(tmp_path, share):
    """Catches a traceback of zipfile's or pickle's."""
    path = save(tmp_path / "a.bin", {"x": torch.ones(100)})
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    assert message(torch_bin.stored, path).startswith(f"{path}: truncated or corrupt (")


def test_damaged_numbers_are_no_surprise(tmp_path):
    """Catches a traceback where the description itself is damaged."""
    for pickled in (b"", b"\x80\x02}", b"garbage", b"\x80\x02}q\x00(X\x01\x00\x00\x00aK\x01u."):
        text = message(torch_bin.stored, archive(tmp_path / "a.bin", pickled))
        assert text.startswith(f"{tmp_path / 'a.bin'}: ")


def test_other_files(tmp_path):
    """Catches formats that are half understood."""
    old = save(tmp_path / "old.bin", {"x": torch.ones(2)}, _use_new_zipfile_serialization=False)
    assert "torch's format before 1.6 is not read; save it with" in message(torch_bin.stored, old)
    assert "no such file" in message(torch_bin.stored, tmp_path / "none.bin")
    nested = save(tmp_path / "nested.bin", {"state_dict": {"x": torch.ones(2)}, "step": 3})
    assert "state_dict is a dict, no tensor" in message(torch_bin.stored, nested)
    with zipfile.ZipFile(tmp_path / "zip.bin", "w") as file:
        file.writestr("a.txt", "hello")
    assert "no file of torch.save" in message(torch_bin.stored, tmp_path / "zip.bin")
