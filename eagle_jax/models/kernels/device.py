"""Where kernels of our own run."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

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


def expected(dtype: jnp.dtype, devices: int) -> bool:
    """Whether kernels will run for a model of this dtype, whole on so many devices or cut over
    them: what decides how it is laid out before anything is traced."""
    return (INTERPRET or _gpu()) and _taken(dtype) and devices == 1


def usable(*arrays: jax.Array) -> bool:
    """Whether kernels may run here at all, on operands like these: of two bytes a number."""
    mesh = jax.sharding.get_abstract_mesh()
    alone = mesh.empty or mesh.size == 1
    here = INTERPRET or (_decoding.get() and _gpu())
    return here and alone and all(_taken(x.dtype) for x in arrays)


def _taken(dtype: jnp.dtype) -> bool:
    return dtype.itemsize == 2


@functools.cache
def _gpu() -> bool:
    if jax.default_backend() != "gpu":
        return False
    capability = getattr(jax.devices()[0], "compute_capability", "0")  # AMD's is no number
    try:
        return float(capability) >= _BFLOAT16_FROM
    except ValueError:
        return False
