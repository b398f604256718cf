"""Dimension letters and array aliases for the library's annotations and einsums.

| letter | meaning |
|---|---|
| b | batch: rows, each with its own sequence |
| t | tokens of the block being processed: a prompt, a training sequence, the nodes of a tree |
| u | tokens that queries may attend to: those of the block itself and of blocks before it |
| s | slots of the key/value cache |
| n | depth of a tree plus one: the longest path, root included |
| d | width of the residual stream, of embeddings and of features |
| v | vocabulary |
| h | query heads |
| k | key/value heads |
| g | query heads per key/value head, h = k * g |
| e | width of one head |
| f | width of the feed-forward block |
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
from jaxtyping import Array, Float, Int

# Parameters of one model: dotted module path -> array. Flat, as names are in checkpoints.
ParamDict = Mapping[str, jax.Array]

Tokens = Int[Array, "b t"]
Hidden = Float[Array, "b t d"]
Logits = Float[Array, "b t v"]

# Keys and values of one layer for one block of tokens or one cache.
# Their length has no letter, because functions take caches (s), blocks (t) and several blocks (u).
KeyValue = tuple[Float[Array, "b k _ e"], Float[Array, "b k _ e"]]
