"""Kernels of our own for what XLA does slowly on NVIDIA GPUs, in Pallas (Triton).

`skinny_matmul` multiplies few rows by a matrix, `norm` adds the result to the residual stream,
`rotary` makes queries, keys and values of it, `attention` reads the used part of a cache once,
`commit` writes accepted tokens into all layers' caches at once, `top_k` finds the best of a
vocabulary. Each has one place that calls it, which takes XLA's way where `fits` says no: outside of
programs that decode (kernels have no gradients), on CPUs and TPUs, for shapes that do not fit, and
in float32, where every way must give the same text (but for `top_k`, which gives the same anyway).

XLA does not cut a kernel of ours: over a mesh they run where `models.per_device` has each device
work on its own parts, and nowhere else.

Their functions are jitted: one that is called in every layer is traced and lowered once.
"""

from eagle_jax.models.kernels import attention, commit, norm, rotary, skinny_matmul, top_k
from eagle_jax.models.kernels.device import (
    decoding,
    expected,
    on_gpu,
    tracing_for,
    usable_per_device,
)

__all__ = ["attention", "commit", "decoding", "expected", "norm", "on_gpu", "rotary"]
__all__ += ["skinny_matmul", "top_k", "tracing_for", "usable_per_device"]
