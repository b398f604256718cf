"""Search for the largest scores over a vocabulary, for CPUs, GPUs and meshes of devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from eagle_jax import sharding
from eagle_jax.models import kernels

_CHUNK = 64  # `top_k` first compares the maxima of chunks of this many entries


def argmax(scores: Float[Array, "*lead v"]) -> Int[Array, "*lead"]:
    """Returns the index of the largest score, the lowest index among equals.

    `jnp.argmax` reduces pairs of value and index, which XLA does not vectorise on CPUs. Two plain
    reductions are several times faster there.
    """
    vocab = scores.shape[-1]
    if kernels.top_k.fits(scores, 1):
        return _largest(scores, 1)[1][..., 0]
    best = jnp.max(scores, axis=-1, keepdims=True)
    index = jax.lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
    first = jnp.min(jnp.where(scores == best, index, vocab), axis=-1)
    return jnp.minimum(first, vocab - 1)  # if the maximum is NaN, no score equals it


def top_k(
    scores: Float[Array, "*lead v"], k: int
) -> tuple[Float[Array, "*lead k"], Int[Array, "*lead k"]]:
    """Returns the same as `lax.top_k`, in two stages if the vocabulary is large.

    The k chunks with the largest maxima contain the k largest entries. Sorting only these is
    several times faster on GPUs than sorting the whole vocabulary. Among equals the lowest index
    wins in all stages, since the chunks stay in order. The first axis of `*lead` is the batch.
    """
    if kernels.top_k.fits(scores, k):
        return _largest(scores, k)[:2]
    if not _cut(scores, k):
        return _top_k(scores, k)
    axes = ("batch", *[None] * (scores.ndim - 2), "vocab")
    found = sharding.on_each_device(lambda x: _top_k(x, k), (scores,), (axes,), (axes, axes))
    best, index = sharding.constrain(found, "batch")
    return _of_parts(best, index, scores.shape[-1], k)


def _cut(scores: Float[Array, "*lead v"], k: int) -> bool:
    """Returns whether each device of a mesh searches its own entries.

    This holds for scores over a vocabulary. The few candidates of a tree are on every device.
    """
    vocab = scores.shape[-1]
    parts = sharding.parts_of("vocab", vocab)
    return parts > 1 and vocab > k * max(_CHUNK, parts)


def _of_parts(
    best: Float[Array, "*lead n"], index: Int[Array, "*lead n"], vocab: int, k: int
) -> tuple[Float[Array, "*lead k"], Int[Array, "*lead k"]]:
    """Merges the k best entries of every device; only these are sent between devices."""
    parts = best.shape[-1] // k
    first = jnp.repeat(jnp.arange(0, vocab, vocab // parts, dtype=index.dtype), k)
    index = index + jnp.broadcast_to(first, index.shape)
    best, place = jax.lax.top_k(best, k)
    return best, jnp.take_along_axis(index, place, axis=-1)


def likeliest(
    scores: Float[Array, "*lead v"], k: int
) -> tuple[Float[Array, "*lead k"], Int[Array, "*lead k"]]:
    """Returns log-softmax values and indices of each row's k best; the logs are <= 0, never NaN."""
    if kernels.top_k.fits(scores, k):
        best, index, whole = _largest(scores, k)
    else:
        best, index = top_k(scores, k)
        whole = jax.nn.logsumexp(scores, axis=-1)
    log = jnp.minimum(best - whole[..., None], 0.0)
    return jnp.where(jnp.isnan(log), -jnp.inf, log), index


def _largest(
    scores: Float[Array, "*lead v"], k: int
) -> tuple[Float[Array, "*lead k"], Int[Array, "*lead k"], Float[Array, "*lead"]]:
    """Runs the kernel, on every device of a mesh: returns values, indices and log-sum-exps."""
    *lead, vocab = scores.shape

    def search(scores):
        found = kernels.top_k.largest(scores.reshape(-1, scores.shape[-1]), k)
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
