"""What a decoding method is: a proposer of token trees of one fixed shape.

A method is a frozen dataclass of static settings (hashable, so that it is a jit key) with three
pure functions. Its own state is any pytree of fixed shapes.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from eagle_jax.decode.sampling import Sampling
from eagle_jax.decode.tree import Shape
from eagle_jax.models import EagleDraft, Transformer
from eagle_jax.types import Hidden, Logits, Tokens


@dataclasses.dataclass(frozen=True)
class Models:
    """Modules bound to their parameters inside a traced function."""

    target: Transformer
    draft: EagleDraft | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompt:
    """What the target's pass over the prompt leaves to a method.

    Attributes:
        tokens: [b, t] right-padded prompts.
        length: [b] their lengths.
        features: [b, t, d] the target's features; the last prompt token's are not committed yet,
            since the first round scores it as its root.
    """

    tokens: Tokens
    length: Int[Array, " b"]
    features: Hidden


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What a method may look at when it proposes.

    Attributes:
        tokens: [b, c] committed tokens, prompt included; entries from `length` on are meaningless.
        length: [b] committed tokens. The root is token `length - 1`.
        noise: [b, n, v] noise of positions `length ..`, that of a node's children at its depth; or
            none when greedy. Drafting with the same noise as the target (noise-coupled drafting)
            makes a good draft win the same draw.
        sampling: how tokens are drawn.
    """

    tokens: Int[Array, "b c"]
    length: Int[Array, " b"]
    noise: Float[Array, "b n v"] | None
    sampling: Sampling

    def root(self) -> Int[Array, " b"]:
        """The last committed token of each row: the root of every tree."""
        return jnp.take_along_axis(self.tokens, self.length[:, None] - 1, 1, mode="clip")[:, 0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Proposal:
    """A tree for each row: `tokens` [b, t] (node 0 the root) and its `shape`."""

    tokens: Tokens
    shape: Shape


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Verified:
    """The target's verdict on a proposal.

    Attributes:
        features: [b, t, d] of every node.
        logits: [b, t, v] of every node.
        path: [b, n] accepted nodes, root first.
        committed: [b] tokens committed in this round (0 for finished rows); the features of
            `path[:committed]` belong to committed tokens.
    """

    features: Hidden
    logits: Logits
    path: Int[Array, "b n"]
    committed: Int[Array, " b"]


@runtime_checkable
class Method(Protocol):
    """A proposer. `nodes` is t, `depth` the longest draft (n - 1); both static."""

    @property
    def nodes(self) -> int: ...

    @property
    def depth(self) -> int: ...

    @property
    def needs_draft(self) -> bool: ...

    def init(self, models: Models, prompt: Prompt, slots: int) -> Any:
        """State after the prompt; `slots` is the capacity for caches over committed tokens."""
        ...

    def propose(self, models: Models, context: Context, state: Any) -> tuple[Proposal, Any]:
        """The next tree of each row."""
        ...

    def update(self, state: Any, verified: Verified) -> Any:
        """State after a round; rows with nothing committed are finished and never read again."""
        ...
