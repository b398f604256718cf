"""Does it fit, and what would it cost? Training and decoding compiled for devices not at hand.

libtpu compiles for a TPU topology on any x86 machine (`pip install 'eagle-jax[tpu]'`), JAX's CUDA
plugin for NVIDIA GPUs (`pip install 'eagle-jax[cuda]'`); nothing runs, no weights exist.
"""

from eagle_jax.aot.config import AotConfig
from eagle_jax.aot.programs import compile_all
from eagle_jax.aot.report import collectives, describe, launches
from eagle_jax.aot.topology import devices

__all__ = ["AotConfig", "collectives", "compile_all", "describe", "devices", "launches"]
