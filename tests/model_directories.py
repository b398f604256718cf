"""Random parameters of any configuration, and model directories to damage."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from eagle_jax.checkpoint import hf, safetensors
from eagle_jax.config import DraftConfig


def random_params(config: DraftConfig, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Of every name its own numbers; a draft vocabulary is scattered over the target's."""
    rng = np.random.default_rng(0)
    shapes = hf.shapes(config)
    params = {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
    if "d2t" in params:
        size = len(params["d2t"])
        tokens = np.sort(rng.permutation(config.vocab_size)[:size])
        params["d2t"] = (tokens - np.arange(size)).astype(np.int32)
    return params


def message(function: Callable, *args, **options) -> str:
    """What the ValueError says, in one line."""
    with pytest.raises(ValueError) as info:
        function(*args, **options)
    text = str(info.value)
    assert "\n" not in text
    return text


def edit(directory: Path, **changes) -> None:
    """Changes keys of `config.json`; "absent" removes one."""
    path = directory / "config.json"
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in settings.items() if v != "absent"}))


def retensor(directory: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Rewrites the tensors after `change` has edited their dictionary."""
    path = directory / "model.safetensors"
    tensors = safetensors.read(path)
    change(tensors)
    safetensors.write(path, tensors)


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """The same names, dtypes and bits."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes(), name
