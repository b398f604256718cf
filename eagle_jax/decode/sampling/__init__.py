"""Sampling: settings, filters of the target's distribution, and noise keyed by position."""

from eagle_jax.decode.sampling.noise import draft_noise, position_noise, position_uniform
from eagle_jax.decode.sampling.processing import Sampling, perturb, process, sampling

__all__ = [
    "Sampling",
    "draft_noise",
    "perturb",
    "position_noise",
    "position_uniform",
    "process",
    "sampling",
]
