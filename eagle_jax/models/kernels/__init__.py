"""Our own Pallas (Triton) kernels for operations that XLA runs slowly on NVIDIA GPUs.

`skinny_matmul` multiplies few rows by a matrix, `norm` adds the result to the residual stream,
`rotary` splits a fused projection into rotated queries, keys and values, `attention` reads only the
used part of a cache, `commit` writes accepted tokens into all layers' caches at once, and `top_k`
finds the best tokens of a vocabulary. Each kernel has one caller, which uses XLA where `fits`
returns False: outside decoding programs (kernels have no gradients), on CPUs and TPUs, for shapes
that do not fit, and in float32, where all implementations must give the same text (`top_k` is exact
and also runs in float32).

XLA cannot partition our kernels. Over a mesh they run only inside `models.per_device`, where each
device works on its own parts.

The functions are jitted, so that one that is called in every layer is traced and lowered once.
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
