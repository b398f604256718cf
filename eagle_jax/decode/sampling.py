"""From logits to tokens: processors, and noise keyed by absolute position (DESIGN section 2).

Noise of position t is `g_t = gumbel(fold_in(key, t))`, one vector over the vocabulary, and the
target's token at t is `argmax(process(logits) + g_t)`: an exact draw from the processed
distribution (the Gumbel-max trick) that depends on the prefix, the key and the position alone,
not on how many tokens were verified together. So every method emits the same text for one seed.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Values are traced: other values compile nothing new.

    Attributes:
        temperature: divides the logits; not read when greedy.
        top_k: keep the k most likely tokens; read if `use_top_k`.
        top_p: keep the smallest set of most likely tokens with at least this much probability
            (after top-k); read if `use_top_p`.
        greedy, use_top_k, use_top_p: static switches.
    """

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    greedy: bool = dataclasses.field(metadata={"static": True})
    use_top_k: bool = dataclasses.field(metadata={"static": True})
    use_top_p: bool = dataclasses.field(metadata={"static": True})


def sampling(temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0) -> Sampling:
    """Checked settings: temperature 0 is greedy, `top_k` 0 and `top_p` 1 switch the filter off."""
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature}: must be 0 (greedy) or a positive number")
    if top_k < 0 or top_k != int(top_k):
        raise ValueError(f"top_k={top_k}: must be 0 (off) or a positive whole number")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: must be above 0 and at most 1 (1 is off)")
    greedy = temperature == 0
    return Sampling(
        temperature=jnp.float32(temperature),
        top_k=jnp.int32(top_k),
        top_p=jnp.float32(top_p),
        greedy=greedy,
        use_top_k=top_k > 0 and not greedy,
        use_top_p=top_p < 1 and not greedy,
    )


def position_noise(
    seeds: UInt32[Array, " b"], first: Int[Array, " b"], count: int, vocab: int
) -> Float[Array, "b n v"]:
    """Gumbel noise of positions `first .. first + count - 1` of each row."""

    def one(seed: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), (vocab,))

    positions = first[:, None] + jnp.arange(count, dtype=jnp.int32)[None]
    return jax.vmap(jax.vmap(one, in_axes=(None, 0)))(seeds, positions)


def process(logits: Float[Array, "*lead v"], settings: Sampling) -> Float[Array, "*lead v"]:
    """Temperature, then top-k, then top-p: excluded tokens get -inf. A function of the prefix only.

    Ties at a threshold are all kept, so that the result never depends on a sort's tie order.
    """
    scaled = logits / settings.temperature
    if not (settings.use_top_k or settings.use_top_p):
        return scaled
    descending = -jnp.sort(-scaled, axis=-1)
    if settings.use_top_k:
        last = jnp.minimum(settings.top_k, logits.shape[-1]) - 1
        floor = jnp.take(descending, last, axis=-1, mode="clip")[..., None]
        scaled = jnp.where(scaled < floor, -jnp.inf, scaled)
        descending = jnp.where(descending < floor, -jnp.inf, descending)
    if settings.use_top_p:
        probs = jax.nn.softmax(descending, axis=-1)
        kept = jnp.cumsum(probs, axis=-1) - probs < settings.top_p
        floor = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
        scaled = jnp.where(scaled < floor, -jnp.inf, scaled)
    return scaled


def perturb(
    logits: Float[Array, "*lead v"], noise: Float[Array, "*lead v"] | None, settings: Sampling
) -> Float[Array, "*lead v"]:
    """Scores whose argmax is the token: processed logits plus noise, or the logits if greedy."""
    if settings.greedy:
        return logits
    assert noise is not None
    return process(logits, settings) + noise
