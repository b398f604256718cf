"""From logits to tokens: processors, and noise keyed by absolute position.

Noise of position t is `g_t = gumbel(fold_in(key, t))`, one vector over the vocabulary, and the
target's token at t is `argmax(process(logits) + g_t)`: an exact draw from the processed
distribution (the Gumbel-max trick) that depends on the prefix, the key and the position alone,
not on how many tokens were verified together. So every method emits the same text for one seed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from eagle_jax import sharding
from eagle_jax.models import kernels

_TINY = 1e-30
_CHUNK = 64  # of the vocabulary, for `top_k`


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


def position_noise(
    seeds: UInt32[Array, " b"], first: Int[Array, " b"], count: int, vocab: int
) -> Float[Array, "b n v"]:
    """Gumbel noise of positions `first .. first + count - 1` of each row."""
    return _by_position(seeds, first, count, lambda key: jax.random.gumbel(key, (vocab,)))


def draft_noise(
    seeds: UInt32[Array, " b"], first: Int[Array, " b"], count: int, vocab: int
) -> Float[Array, "b n v"]:
    """Gumbel noise independent of `position_noise`, for drafts that must not know the target's."""

    def draw(key: jax.Array) -> jax.Array:
        return jax.random.gumbel(jax.random.fold_in(key, 1), (vocab,))

    return _by_position(seeds, first, count, draw)


def position_uniform(
    seeds: UInt32[Array, " b"], first: Int[Array, " b"], count: int
) -> Float[Array, "b n"]:
    """Uniform numbers of positions, independent of both noises above."""
    return _by_position(
        seeds, first, count, lambda key: jax.random.uniform(jax.random.fold_in(key, 2))
    )


def _by_position(
    seeds: UInt32[Array, " b"],
    first: Int[Array, " b"],
    count: int,
    draw: Callable[[jax.Array], jax.Array],
) -> Array:
    def one(seed: jax.Array, position: jax.Array) -> jax.Array:
        return draw(jax.random.fold_in(jax.random.key(seed), position))

    positions = first[:, None] + jnp.arange(count, dtype=jnp.int32)[None]
    return jax.vmap(jax.vmap(one, in_axes=(None, 0)))(seeds, positions)


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


def argmax(scores: Float[Array, "*lead v"]) -> Int[Array, "*lead"]:
    """Index of the largest score, the lowest among equals.

    `jnp.argmax` reduces pairs of value and index, which XLA does not vectorise on CPUs: 40 us for
    a row of 8k, against 4 for these two plain reductions.
    """
    vocab = scores.shape[-1]
    if kernels.top.fits(scores, 1):
        return _largest(scores, 1)[1][..., 0]
    best = jnp.max(scores, axis=-1, keepdims=True)
    index = jax.lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
    first = jnp.min(jnp.where(scores == best, index, vocab), axis=-1)
    return jnp.minimum(first, vocab - 1)  # nothing equals a NaN


def top_k(
    scores: Float[Array, "*lead v"], k: int
) -> tuple[Float[Array, "*lead k"], Int[Array, "*lead k"]]:
    """`lax.top_k`, in two stages where the vocabulary is large.

    The k chunks with the largest maxima hold the k largest entries, and sorting a whole vocabulary
    for a few of its entries costs GPUs several times that. Among equals the lowest index wins in
    all stages, since the chunks stay in order. `*lead` begins with the batch.
    """
    if kernels.top.fits(scores, k):
        return _largest(scores, k)[:2]
    if not _cut(scores, k):
        return _top_k(scores, k)
    axes = ("batch", *[None] * (scores.ndim - 2), "vocab")
    found = sharding.on_each_device(lambda x: _top_k(x, k), (scores,), (axes,), (axes, axes))
    best, index = sharding.constrain(found, "batch")
    return _of_parts(best, index, scores.shape[-1], k)


def _cut(scores: Float[Array, "*lead v"], k: int) -> bool:
    """Whether each device of a mesh searches its own entries: those of a vocabulary, not of the few
    candidates that a tree chooses from, which every device has."""
    vocab = scores.shape[-1]
    parts = sharding.ways_of("vocab", vocab)
    return parts > 1 and vocab > k * max(_CHUNK, parts)


def _of_parts(
    best: Float[Array, "*lead n"], index: Int[Array, "*lead n"], vocab: int, k: int
) -> tuple[Float[Array, "*lead k"], Int[Array, "*lead k"]]:
    """What devices found in their own entries, k each; only these were sent."""
    parts = best.shape[-1] // k
    first = jnp.repeat(jnp.arange(0, vocab, vocab // parts, dtype=index.dtype), k)
    index = index + jnp.broadcast_to(first, index.shape)
    best, place = jax.lax.top_k(best, k)
    return best, jnp.take_along_axis(index, place, axis=-1)


def likeliest(
    scores: Float[Array, "*lead v"], k: int
) -> tuple[Float[Array, "*lead k"], Int[Array, "*lead k"]]:
    """The k best of each row and the logs of their shares in the row's softmax.

    Never positive, never NaN.
    """
    if kernels.top.fits(scores, k):
        best, index, whole = _largest(scores, k)
    else:
        best, index = top_k(scores, k)
        whole = jax.nn.logsumexp(scores, axis=-1)
    log = jnp.minimum(best - whole[..., None], 0.0)
    return jnp.where(jnp.isnan(log), -jnp.inf, log), index


def _largest(
    scores: Float[Array, "*lead v"], k: int
) -> tuple[Float[Array, "*lead k"], Int[Array, "*lead k"], Float[Array, "*lead"]]:
    """By the kernel, over a mesh on each of its devices."""
    *lead, vocab = scores.shape

    def search(scores):
        found = kernels.top.largest(scores.reshape(-1, scores.shape[-1]), k)
        return tuple(x.reshape(*scores.shape[:-1], -1) for x in found)

    if not sharding.over_several():
        best, index, whole = search(scores)
        return best, index, whole[..., 0]
    cut = _cut(scores, k)
    axes = ("batch", *[None] * (len(lead) - 1), "vocab" if cut else None)
    found = sharding.on_each_device(search, (scores,), (axes,), (axes,) * 3)
    if not cut:
        best, index, whole = found
        return best, index, whole[..., 0]
    best, index, whole = sharding.constrain(found, "batch")
    return *_of_parts(best, index, vocab, k), jax.nn.logsumexp(whole, axis=-1)


def _top_k(
    scores: Float[Array, "*lead v"], k: int
) -> tuple[Float[Array, "*lead k"], Int[Array, "*lead k"]]:
    if k == 1:
        return jnp.max(scores, axis=-1, keepdims=True), argmax(scores)[..., None]
    *lead, vocab = scores.shape
    if vocab <= k * _CHUNK:
        best, index = jax.lax.top_k(scores, k)
        return best, index
    padding = [(0, 0)] * len(lead) + [(0, -vocab % _CHUNK)]
    chunks = jnp.pad(scores, padding, constant_values=-jnp.inf).reshape(*lead, -1, _CHUNK)
    _, chosen = jax.lax.top_k(jnp.max(chunks, axis=-1), k)
    chosen = jnp.sort(chosen, axis=-1)
    held = jnp.take_along_axis(chunks, chosen[..., None], axis=-2).reshape(*lead, k * _CHUNK)
    best, place = jax.lax.top_k(held, k)
    chunk = jnp.take_along_axis(chosen, place // _CHUNK, axis=-1)
    return best, chunk * _CHUNK + place % _CHUNK
