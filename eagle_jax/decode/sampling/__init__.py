"""Sampling: the user's settings (`SamplingParams`), their arrays (`Sampling`), filters, noise."""

from eagle_jax.decode.sampling.filters import FILTERS, Capacities, Filter
from eagle_jax.decode.sampling.noise import draft_noise, position_noise, position_uniform
from eagle_jax.decode.sampling.params import SamplingParams, Settings, rows_of, seeds_of
from eagle_jax.decode.sampling.path import Path
from eagle_jax.decode.sampling.value import Sampling, perturb, process
from eagle_jax.decode.sampling.vocabulary import Vocabulary

__all__ = [
    "FILTERS",
    "Capacities",
    "Filter",
    "Path",
    "Sampling",
    "SamplingParams",
    "Settings",
    "Vocabulary",
    "draft_noise",
    "perturb",
    "position_noise",
    "position_uniform",
    "process",
    "rows_of",
    "seeds_of",
]
