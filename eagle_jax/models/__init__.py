"""The target transformer, the EAGLE draft, and the key/value cache they share."""

from eagle_jax.models.cache import Cache
from eagle_jax.models.eagle import EagleDraft
from eagle_jax.models.functional import bind, cast, init_params
from eagle_jax.models.transformer import Transformer

__all__ = ["Cache", "EagleDraft", "Transformer", "bind", "cast", "init_params"]
