"""Where kernels of our own run."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator

import jax

# Pallas runs the kernels anywhere on any device then, slowly; for tests.
INTERPRET = False

_BFLOAT16_FROM = 8.0  # compute capability: Ampere

_decoding = contextvars.ContextVar("decoding", default=False)


@contextlib.contextmanager
def decoding() -> Iterator[None]:
    """The context in which programs that decode are traced; others need gradients."""
    token = _decoding.set(True)
    try:
        yield
    finally:
        _decoding.reset(token)


def usable(*arrays: jax.Array) -> bool:
    """Whether kernels may run here at all, on operands like these: of two bytes a number."""
    mesh = jax.sharding.get_abstract_mesh()
    alone = mesh.empty or mesh.size == 1
    here = INTERPRET or (_decoding.get() and _gpu())
    return here and alone and all(x.dtype.itemsize == 2 for x in arrays)


@functools.cache
def _gpu() -> bool:
    if jax.default_backend() != "gpu":
        return False
    capability = getattr(jax.devices()[0], "compute_capability", "0")  # AMD's is no number
    try:
        return float(capability) >= _BFLOAT16_FROM
    except ValueError:
        return False
