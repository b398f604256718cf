"""The target transformer, every kind of draft, and the key/value cache they share."""

from eagle_jax.models.binding import bind, cast, init_params, param_shapes
from eagle_jax.models.cache import Cache
from eagle_jax.models.eagle import EagleDraft
from eagle_jax.models.eagle3 import Eagle3Draft
from eagle_jax.models.medusa import MedusaHeads
from eagle_jax.models.transformer import Output, Transformer

# The module of each kind of draft, by its configuration's `kind`.
DRAFTS = {
    "eagle": EagleDraft,
    "eagle3": Eagle3Draft,
    "medusa": MedusaHeads,
    "model": Transformer,
}

__all__ = [
    "DRAFTS",
    "Cache",
    "Eagle3Draft",
    "EagleDraft",
    "MedusaHeads",
    "Output",
    "Transformer",
    "bind",
    "cast",
    "init_params",
    "param_shapes",
]
