"""Compiles training and decoding for absent devices, and reports their memory and cost.

libtpu compiles for a TPU topology on any x86 machine (`pip install 'eagle-jax[tpu]'`), and JAX's
CUDA plugin compiles for NVIDIA GPUs (`pip install 'eagle-jax[cuda]'`). No program runs, and no
weights are needed.
"""

from eagle_jax.aot.config import AotConfig
from eagle_jax.aot.programs import compile_all
from eagle_jax.aot.report import collectives, describe, launches
from eagle_jax.aot.topology import devices

__all__ = ["AotConfig", "collectives", "compile_all", "describe", "devices", "launches"]
