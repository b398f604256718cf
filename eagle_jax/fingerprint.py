"""Fingerprints: short hashes by which stored results know what they belong to.

Each says of what it is. `of_params` is of models in memory, `of_weight_files` of a model's
directory, `of_file` of one whole file, `of_json` of small settings, `of_arrays` of training state
on devices. Two that are equal mean the same weights; none protects against forgery.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # commands that only print their help import this module
    import jax
    import numpy as np

    from eagle_jax.params import Params

_HEXADECIMAL_DIGITS = 32  # of a short fingerprint
_CORNER = 64  # values that are read of every matrix
_WEIGHT_FILES = (".safetensors", ".bin", ".pt")
# Files up to the first size are read whole; of larger ones, the first part of every step. In bytes.
_READ_WHOLE, _STEP, _PART = 64 * 2**20, 2**20, 4096


def of_params(params: Params) -> str:
    """Hashes a target and its drafts in memory: configurations, layouts and samples of weights.

    All vectors count, and the first values of every matrix: training changes all of them. Over
    several processes only vectors count, since no process has all matrices.
    """
    import numpy as np

    digest = hashlib.sha256()
    models = [
        ("target", params.target_config, params.layout, params.target),
        *(
            (kind, draft.config, draft.layout, draft.params)
            for kind, draft in sorted(params.drafts.items())
        ),
    ]
    for kind, config, layout, arrays in models:
        digest.update(f"{kind} {config} {layout}".encode())
        for name, array in sorted(_samples(arrays).items()):
            digest.update(name.encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:_HEXADECIMAL_DIGITS]


def _samples(arrays: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    import jax
    import numpy as np

    vectors = {name: array for name, array in arrays.items() if array.ndim == 1}
    if jax.process_count() > 1:
        return jax.device_get(vectors)
    matrices: Mapping[str, Any] = {name: x for name, x in arrays.items() if x.ndim > 1}
    if jax.default_backend() == "cpu":  # numpy reads there what JAX would compile slices for
        matrices = {name: np.asarray(array) for name, array in matrices.items()}
    corners = {name: array[(0,) * (array.ndim - 1)][:_CORNER] for name, array in matrices.items()}
    return jax.device_get({**vectors, **corners})


def of_weight_files(directory: Path) -> str:
    """Hashes the weights in a model's directory without reading all of them.

    Of files above 64 MiB the size counts and 4 KiB of every MiB: training changes every tensor.
    One damaged byte of a large file may go unnoticed.
    """
    found = sorted(path for end in _WEIGHT_FILES for path in directory.glob(f"*{end}"))
    digest = hashlib.sha256()
    for path in found:
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            part = _PART if size > _READ_WHOLE else _STEP
            for start in range(0, size, _STEP):
                file.seek(start)
                digest.update(file.read(part))
    return digest.hexdigest()


def of_file(path: Path) -> str:
    """Returns the SHA-256 of all bytes of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of_texts(*texts: str | bytes) -> str:
    """Hashes a few strings, in this order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() if isinstance(text, str) else text)
    return digest.hexdigest()[:_HEXADECIMAL_DIGITS]


def of_json(content: Any) -> str:
    """Returns the SHA-256 of what JSON can hold; the order of keys does not count."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def of_arrays(tree: Any) -> int:
    """Sums all words of a tree of arrays on their devices, modulo 2**32.

    One changed word changes it, and so do two arrays that changed places; how the arrays are cut
    over devices does not.
    """
    return int(_word_sum()(tree))


@functools.cache
def _word_sum() -> Any:
    import jax
    import jax.numpy as jnp

    def of_array(x: jax.Array) -> jax.Array:
        unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
        return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32).sum(dtype=jnp.uint32)

    @jax.jit
    def total(tree: Any) -> jax.Array:
        leaves = jax.tree.leaves(tree)
        terms = [of_array(x) * jnp.uint32(2 * i + 1) for i, x in enumerate(leaves)]
        return functools.reduce(jnp.add, terms)

    return total
