"""`Sampling`: the settings of all rows as arrays, and the way from logits to scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from eagle_jax.decode.sampling.filters import FILTERS, Capacities, Filter, per_row
from eagle_jax.decode.sampling.noise import position_noise
from eagle_jax.decode.sampling.params import SamplingParams
from eagle_jax.decode.sampling.path import Path
from eagle_jax.decode.sampling.vocabulary import Vocabulary
from eagle_jax.types import Logits

T = TypeVar("T")
NOBODY = -1  # pads end tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How each row's tokens are drawn. Values are traced: other values compile nothing new.

    Static is only what saves time where it is absent. A program without filters has none of them; a
    program with filters has all, and skips at run time those that no row uses.

    Attributes:
        temperature: [b] divides the logits; a row of 0 is greedy.
        ends: [b, m] tokens that end a row's answer, padded with `NOBODY`.
        prompt: [b] tokens of each row's prompt: what follows is the answer.
        filters: in their order; empty if no row uses any.
        greedy: static; no row samples, so that no noise is computed.
    """

    temperature: Float[Array, " b"]
    ends: Int[Array, "b m"]
    prompt: Int[Array, " b"]
    filters: tuple[Filter, ...]
    greedy: bool = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(
        cls,
        rows: Sequence[SamplingParams],
        vocabulary: Vocabulary,
        prompts: Sequence[int] | None = None,
        capacities: Capacities | None = None,
    ) -> Sampling:
        """The arrays of these rows, on the host.

        Args:
            rows: what `Vocabulary.resolve` returned for each row.
            vocabulary: of the model.
            prompts: length of each row's prompt; without it 0.
            capacities: sizes of arrays; by default those that fit.
        """
        capacities = capacities or Capacities()
        greedy = all(row.temperature == 0 for row in rows)
        kinds = [kind for kind in FILTERS if not (greedy and kind.truncates)]
        filtered = any(kind.uses(row) for kind in kinds for row in rows)
        ends = [vocabulary.ends(row) for row in rows]
        arrays: dict[str, Any] = {
            "temperature": np.array([row.temperature for row in rows], np.float32),
            "ends": capacities.padded("ends", ends, NOBODY, 8).astype(np.int32),
            "prompt": np.array(prompts or [0] * len(rows), np.int32),
        }
        return cls(
            **arrays,
            filters=tuple(kind.of(rows, vocabulary, capacities) for kind in kinds if filtered),
            greedy=greedy,
        )

    @property
    def sampled(self) -> Bool[Array, " b"]:
        """Which rows draw with noise."""
        return jnp.asarray(self.temperature) > 0

    def noise(
        self, seeds: UInt32[Array, " b"], first: Int[Array, " b"], count: int, vocab: int
    ) -> Float[Array, "b n v"] | None:
        """Returns Gumbel noise of `count` positions from `first` on, or None if no row samples.

        Greedy rows get 0.
        """
        if self.greedy:
            return None
        noise = position_noise(seeds, first, count, vocab)
        return jnp.where(per_row(self.sampled, noise), noise, 0.0)

    def choose(self, sampled: T, greedy: T) -> T:
        """`sampled` for the rows that draw with noise, `greedy` for the others."""

        def one(a: Array, c: Array) -> Array:
            return jnp.where(per_row(self.sampled, a), a, c)

        return jax.tree.map(one, sampled, greedy)

    def scaled(self, logits: Float[Array, "b *t v"]) -> Float[Array, "b *t v"]:
        """The logits over each row's temperature; those of greedy rows as they are."""
        temperature = jnp.where(self.sampled, self.temperature, 1.0)
        return logits / per_row(temperature, logits).astype(logits.dtype)

    def process(self, logits: Logits, path: Path) -> Logits:
        """The target's logits after all filters and the temperature: excluded tokens get -inf.

        A function of the text before each node only, whatever the tree.
        """
        for one in self.filters:
            if not one.truncates:
                logits = one(logits, path)
        return process(logits, self)


def process(logits: Float[Array, "b *t v"], settings: Sampling) -> Float[Array, "b *t v"]:
    """Applies temperature, then top-k, top-p and min-p.

    Drafts are drawn from the result. This is the last part of `Sampling.process`.
    """
    if settings.greedy:
        return logits
    logits = settings.scaled(logits)
    for one in settings.filters:
        if one.truncates:
            logits = one(logits, None)
    return logits


def perturb(
    logits: Float[Array, "b *t v"], noise: Float[Array, "b *t v"] | None, settings: Sampling
) -> Float[Array, "b *t v"]:
    """Scores whose argmax is a draft's token: processed logits plus noise, or the logits if greedy.

    The noise of greedy rows must be 0 (see `Sampling.noise`).
    """
    if settings.greedy:
        return logits
    assert noise is not None
    return process(logits, settings) + noise
