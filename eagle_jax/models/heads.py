"""Makes queries, keys and values with rotary positions; selects our kernel or XLA.

On GPUs our kernel splits the fused projection of all three. For very few tokens the attention
kernel splits it itself, which saves a launch.
"""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from eagle_jax.config import RopeScaling
from eagle_jax.models import kernels
from eagle_jax.models.kernels.attention import UnsplitHeads
from eagle_jax.models.matmul import PartialSums, Product
from eagle_jax.models.rotary import angles, rotary
from eagle_jax.sharding import constrain

__all__ = ["Heads", "UnsplitHeads", "rotated", "split", "unsplit"]

# Query [b, t, h, e], keys [b, t, k, e] and values [b, t, k, e].
Heads = tuple[Float[Array, "b t h e"], Float[Array, "b t k e"], Float[Array, "b t k e"]]


def unsplit(
    product: Product,
    x: Float[Array, "b t i"],
    positions: Int[Array, "b t"],
    groups: int,
    head_dim: int,
    theta: float,
    scaling: RopeScaling | None,
) -> UnsplitHeads | None:
    """Returns a fused projection in the form that our kernels read, or None if they do not fit.

    Args:
        product: the projection [b, t, k (groups + 2) e].
        x: input of the projection.
        positions: positions of its tokens.
        groups: query heads per key head.
        head_dim: e.
        theta, scaling: base and scaling of the rotary embedding.
    """
    if not isinstance(product, PartialSums) or not kernels.rotary.fits(x, head_dim):
        return None
    k = product.shape[-1] // ((groups + 2) * head_dim)  # this device's key heads
    cos, sin = angles(positions, head_dim // 2, theta, scaling)
    return UnsplitHeads(product.parts, cos, sin, (k, groups + 2, head_dim), x.dtype)


def split(heads: UnsplitHeads) -> Heads:
    """Returns rotated queries and keys, and values, by our kernel."""
    grouped, keys, values = kernels.rotary.split(
        heads.parts, heads.cos, heads.sin, heads.heads, heads.dtype
    )
    (b, k, t, e), g = keys.shape, heads.heads[1] - 2
    query = grouped.reshape(b, k, t, g, e).transpose(0, 2, 1, 3, 4)
    query = query.reshape(b, t, k * g, e)
    return query, keys.transpose(0, 2, 1, 3), values.transpose(0, 2, 1, 3)


def rotated(
    query: Float[Array, "b t h e"],
    keys: Float[Array, "b t k e"],
    values: Float[Array, "b t k e"],
    positions: Int[Array, "b t"],
    theta: float,
    scaling: RopeScaling | None,
) -> Heads:
    """Returns queries and keys rotated to their positions, and values, by XLA."""
    query = rotary(query, positions, theta, scaling)
    keys = rotary(keys, positions, theta, scaling)
    query, keys, values = constrain((query, keys, values), "batch", None, "heads")
    return query, keys, values
