"""From logits to tokens: temperature, filters, and the sum with the noise."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

_TINY = 1e-30


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
    for name, value in (("temperature", temperature), ("top_k", top_k), ("top_p", top_p)):
        if not isinstance(value, int | float | np.number) or isinstance(value, bool):
            raise ValueError(f"{name}={value!r}: must be a number")
    # Beyond these limits quotients and sums leave float32's range, and text turns to noise.
    if temperature != 0 and not _TINY <= temperature <= 1 / _TINY:
        raise ValueError(
            f"temperature={temperature}: must be 0 (greedy) or a positive number, {_TINY} to "
            f"{1 / _TINY}"
        )
    if not 0 <= top_k < float("inf") or top_k != int(top_k):
        raise ValueError(f"top_k={top_k}: must be 0 (off) or a positive whole number")
    if not _TINY <= top_p <= 1:
        raise ValueError(f"top_p={top_p}: must be above 0 and at most 1 (1 is off)")
    greedy = temperature == 0
    return Sampling(
        temperature=jnp.float32(temperature),
        top_k=jnp.int32(min(int(top_k), 2**31 - 1)),
        top_p=jnp.float32(top_p),
        greedy=greedy,
        use_top_k=top_k > 0 and not greedy,
        use_top_p=top_p < 1 and not greedy,
    )


def process(logits: Float[Array, "*lead v"], settings: Sampling) -> Float[Array, "*lead v"]:
    """Temperature, then top-k, then top-p: excluded tokens get -inf. A function of the prefix only.

    Tokens that tie with the last one kept stay, so that nothing depends on a sort's tie order.
    """
    scaled = logits / settings.temperature
    if settings.use_top_k:
        wanted = jnp.minimum(settings.top_k, logits.shape[-1])
        scaled = _keep(scaled, scaled, lambda kept: jnp.sum(kept, axis=-1) >= wanted)
    if settings.use_top_p:
        probs = jax.nn.softmax(scaled, axis=-1)
        # Rounding may leave the whole at less than a top-p near one: all of it is then enough.
        wanted = jnp.minimum(settings.top_p, jnp.sum(probs, axis=-1))
        scaled = _keep(
            scaled, probs, lambda kept: jnp.sum(jnp.where(kept, probs, 0), axis=-1) >= wanted
        )
    return scaled


def _keep(
    scaled: Float[Array, "*lead v"],
    values: Float[Array, "*lead v"],
    enough: Callable[[Bool[Array, "*lead v"]], Bool[Array, "*lead"]],
) -> Float[Array, "*lead v"]:
    """`scaled` where `values` are among the largest that together are `enough`, -inf elsewhere.

    The threshold is found by bisection over the bits of a float, 32 passes over the vocabulary: a
    sort of every node's logits costs several times that, on CPUs more than the target itself.
    """
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    order = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # integers in the order of the floats

    def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # `low` keeps enough, `high` keeps too few
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, without overflow
        good = enough(order >= middle[..., None])
        return jnp.where(good, middle, low), jnp.where(good, high, middle)

    low = jnp.full(values.shape[:-1], jnp.iinfo(jnp.int32).min)
    high = jnp.full(values.shape[:-1], jnp.iinfo(jnp.int32).max)
    threshold, _ = jax.lax.fori_loop(0, 32, halve, (low, high))
    return jnp.where(order >= threshold[..., None], scaled, -jnp.inf)


def perturb(
    logits: Float[Array, "*lead v"], noise: Float[Array, "*lead v"] | None, settings: Sampling
) -> Float[Array, "*lead v"]:
    """Scores whose argmax is the token: processed logits plus noise, or the logits if greedy."""
    if settings.greedy:
        return logits
    assert noise is not None
    return process(logits, settings) + noise
