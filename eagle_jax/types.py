"""The dimension dictionary and array aliases used in annotations and einsums of the library.

| letter | meaning |
|---|---|
| b | batch: rows, each a sequence of its own |
| t | tokens of the block being processed: a prompt, a training sequence, the nodes of a tree |
| u | tokens of the block that queries may attend to (the block itself, and blocks before it) |
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
from jaxtyping import Array, Bool, Float, Int

# Parameters of one model: dotted module path -> array. Flat, so that names are the checkpoint's.
ParamDict = Mapping[str, jax.Array]

Tokens = Int[Array, "b t"]
Hidden = Float[Array, "b t d"]
Logits = Float[Array, "b t v"]
Mask = Bool[Array, "b t u"]

# Keys and values of one layer for one block of tokens or one cache.
# Their length is left open: a cache (s), a block (t) and several blocks (u) meet in one function.
KeyValue = tuple[Float[Array, "b k _ e"], Float[Array, "b k _ e"]]
