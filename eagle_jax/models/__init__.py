"""The target transformer, the KV cache, and modules as pure functions of their parameters."""

from eagle_jax.models.binding import bind, cast, init_params, param_names, param_shapes
from eagle_jax.models.cache import Cache
from eagle_jax.models.transformer import Output, Transformer

__all__ = [
    "Cache",
    "Output",
    "Transformer",
    "bind",
    "cast",
    "init_params",
    "param_names",
    "param_shapes",
]
