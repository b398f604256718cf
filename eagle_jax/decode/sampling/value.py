"""`Sampling`: the settings of all rows as arrays, and the functions that apply them to logits."""

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
NOBODY = -1  # padding in arrays of end tokens; no token has this id


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """The sampling settings of every row, as traced arrays: new values need no new compilation.

    Only two choices are static, because each saves time: whether any row samples, and whether any
    row uses a filter. A program with filters contains all of them and skips at run time those that
    no row uses.

    Attributes:
        temperature: [b] divides the logits; 0 makes a row greedy.
        ends: [b, m] tokens that end a row's answer, padded with `NOBODY`.
        prompt: [b] length of each row's prompt in tokens; the answer follows it.
        filters: the filters in the order of `FILTERS`; empty if no row uses any.
        greedy: static; whether all rows are greedy, so that no noise is computed.
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
        """Returns the settings of these rows as host arrays.

        Args:
            rows: the settings that `Vocabulary.resolve` returned for each row.
            vocabulary: the model's vocabulary.
            prompts: length of each row's prompt; 0 by default.
            capacities: sizes of the padded arrays; by default the smallest that fit.
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
        """Whether each row samples, i.e. draws with noise."""
        return jnp.asarray(self.temperature) > 0

    def noise(
        self, seeds: UInt32[Array, " b"], first: Int[Array, " b"], count: int, vocab: int
    ) -> Float[Array, "b n v"] | None:
        """Returns the Gumbel noise of `count` positions from `first` on.

        The noise of greedy rows is 0. Returns None if all rows are greedy.
        """
        if self.greedy:
            return None
        noise = position_noise(seeds, first, count, vocab)
        return jnp.where(per_row(self.sampled, noise), noise, 0.0)

    def choose(self, sampled: T, greedy: T) -> T:
        """Returns `sampled` for the rows that sample and `greedy` for the other rows."""

        def one(a: Array, c: Array) -> Array:
            return jnp.where(per_row(self.sampled, a), a, c)

        return jax.tree.map(one, sampled, greedy)

    def scaled(self, logits: Float[Array, "b *t v"]) -> Float[Array, "b *t v"]:
        """Returns the logits divided by each row's temperature; greedy rows are unchanged."""
        temperature = jnp.where(self.sampled, self.temperature, 1.0)
        return logits / per_row(temperature, logits).astype(logits.dtype)

    def process(self, logits: Logits, path: Path) -> Logits:
        """Returns the target's logits after all filters and the temperature.

        Excluded tokens get -inf. The result at a node depends only on the text that ends there, not
        on the rest of the tree.
        """
        for one in self.filters:
            if not one.truncates:
                logits = one(logits, path)
        return process(logits, self)


def process(logits: Float[Array, "b *t v"], settings: Sampling) -> Float[Array, "b *t v"]:
    """Applies the temperature, then the filters that truncate, in their order.

    Drafts are drawn from the result. `Sampling.process` ends with this step.
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
    """Returns the scores whose argmax is the drafted token.

    They are the processed logits plus noise, or the logits if all rows are greedy. The noise of
    greedy rows must be 0 (see `Sampling.noise`).
    """
    if settings.greedy:
        return logits
    assert noise is not None
    return process(logits, settings) + noise
