"""Decides where our own kernels run."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from eagle_jax import sharding

# If True, Pallas interprets the kernels on any device, slowly; for tests.
INTERPRET = False

_BFLOAT16_FROM = 8.0  # lowest compute capability with bfloat16 (Ampere)

_decoding = contextvars.ContextVar("decoding", default=False)
_absent: contextvars.ContextVar[jax.Device | None] = contextvars.ContextVar("absent", default=None)


@contextlib.contextmanager
def decoding() -> Iterator[None]:
    """Marks a context where decoding programs are traced; kernels have no gradients elsewhere."""
    token = _decoding.set(True)
    try:
        yield
    finally:
        _decoding.reset(token)


@contextlib.contextmanager
def tracing_for(device: jax.Device) -> Iterator[None]:
    """Marks a context where programs are traced for a device that this machine lacks."""
    token = _absent.set(device)
    try:
        yield
    finally:
        _absent.reset(token)


def on_gpu() -> bool:
    """Returns whether programs are traced for a GPU."""
    device = _absent.get()
    return jax.default_backend() == "gpu" if device is None else device.platform == "gpu"


def expected(dtype: jnp.dtype) -> bool:
    """Returns whether our kernels will run for models of this dtype, which decides their layout.

    It can be called outside tracing. The answer also holds over a mesh, except for targets with
    experts.
    """
    return (INTERPRET or _gpu()) and _taken(dtype)


def usable(*arrays: jax.Array) -> bool:
    """Returns whether kernels may run here on these operands; their dtype must have two bytes."""
    return _here(*arrays) and not sharding.over_several()


def usable_per_device(*arrays: jax.Array) -> bool:
    """Returns whether kernels may run on each device of the mesh in use (`models.per_device`).

    They cannot run directly on arrays that are partitioned over the mesh.
    """
    return _here(*arrays) and sharding.over_several()


def _here(*arrays: jax.Array) -> bool:
    here = INTERPRET or (_decoding.get() and _gpu())
    return here and all(_taken(x.dtype) for x in arrays)


def _taken(dtype: jnp.dtype) -> bool:
    return dtype.itemsize == 2


def _gpu() -> bool:
    return on_gpu() and _takes_bfloat16(_absent.get() or jax.devices()[0])


@functools.cache
def _takes_bfloat16(device: jax.Device) -> bool:
    capability = getattr(device, "compute_capability", "0")  # not a number on AMD
    try:
        return float(capability) >= _BFLOAT16_FROM
    except ValueError:
        return False
