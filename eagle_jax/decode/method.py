"""The interface of a decoding method, which proposes token trees of one fixed shape.

A method is a frozen dataclass of static settings (hashable, so that it can be a static argument of
jit) with three pure functions. Its state is any pytree of fixed shapes.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from eagle_jax.decode.sampling import Sampling
from eagle_jax.decode.tree import Proposal
from eagle_jax.models import Output, Transformer
from eagle_jax.params import Params
from eagle_jax.types import Hidden, Logits, Tokens


@dataclasses.dataclass(frozen=True)
class Models:
    """Modules bound to their parameters inside a traced function.

    Attributes:
        target: the target model.
        draft: the draft module of the kind that the method uses (`eagle_jax.drafters`), if any.
    """

    target: Transformer
    draft: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompt:
    """The prompts and their target features, from which a method initialises its state.

    Attributes:
        tokens: [b, t] right-padded prompts.
        length: [b] their lengths.
        features: [b, t, ·] the part of the target's output that the draft's `features` selects, or
            None if the draft reads none. Do not use those of the last prompt token: it is the first
            round's root, and that round computes them again.
    """

    tokens: Tokens
    length: Int[Array, " b"]
    features: Hidden | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """The information that a method may use when it proposes.

    Attributes:
        tokens: [b, c] committed tokens, prompt included; entries from `length` on are meaningless.
        length: [b] number of committed tokens. The root is token `length - 1`.
        noise: [b, n, v] noise of the positions from `length` on, or None if all rows are greedy.
            Entry d is the noise for children of nodes at depth d. Drafting with the target's noise
            (noise coupling) makes the draft's draw agree with the target's more often.
        sampling: the sampling settings of the rows.
        seeds: [b] seeds of the noise, for methods that need their own noise.
        longest: n, nodes on the longest path, including the root; static.
    """

    tokens: Int[Array, "b c"]
    length: Int[Array, " b"]
    seeds: UInt32[Array, " b"]
    noise: Float[Array, "b n v"] | None
    sampling: Sampling
    longest: int = dataclasses.field(metadata={"static": True})

    def root(self) -> Int[Array, " b"]:
        """Returns the last committed token of each row, which is the root of its tree."""
        return jnp.take_along_axis(self.tokens, self.length[:, None] - 1, 1, mode="clip")[:, 0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Verified:
    """A proposal with the target's results for it.

    Attributes:
        proposal: the verified trees.
        output: the target's output at every node.
        logits: [b, t, v] the target's logits at every node.
        targets: [b, t] the target's token after every node, drawn with the noise of its position.
        path: [b, n] accepted nodes, root first.
        committed: [b] tokens committed in this round (0 for finished rows); `path[:committed]` are
            the nodes of committed tokens.
    """

    proposal: Proposal
    output: Output
    logits: Logits
    targets: Int[Array, "b t"]
    path: Int[Array, "b n"]
    committed: Int[Array, " b"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Accepted:
    """The accepted path of each row.

    Attributes:
        path: [b, n] its nodes by depth, root first; entries past `count` repeat the root.
        count: [b] number of accepted drafted tokens, 0 to n - 1.
        emitted: [b, n] tokens to commit: `count` accepted ones, then the bonus token; later entries
            are meaningless.
    """

    path: Int[Array, "b n"]
    count: Int[Array, " b"]
    emitted: Int[Array, "b n"]


@runtime_checkable
class Rule(Protocol):
    """An acceptance rule: it decides which path of a verified proposal is accepted.

    `lossless` says whether answers have the target's distribution. `seeded` says whether they equal
    vanilla decoding's answers with the same seed. See `eagle_jax.decode.acceptance`.
    """

    lossless: ClassVar[bool]
    seeded: ClassVar[bool]

    def __call__(
        self, proposal: Proposal, logits: Logits, targets: Int[Array, "b t"], context: Context
    ) -> Accepted:
        """Returns the accepted path of each row.

        `logits` are the target's processed logits (`Sampling.process`) at every node; `targets` are
        the target's own tokens after every node.
        """
        ...


@runtime_checkable
class Method(Protocol):
    """A decoding method; all its properties are static.

    `nodes` is t, the nodes of a tree including the root. `depth` is the longest draft (n - 1).
    `draft` is the kind of draft that the method uses, or None. `rule` is its acceptance rule.
    """

    @property
    def nodes(self) -> int: ...

    @property
    def depth(self) -> int: ...

    @property
    def draft(self) -> str | None: ...

    @property
    def rule(self) -> Rule: ...

    def check(self, params: Params) -> None:
        """Raise a ValueError of one line if these settings cannot work with these models."""
        ...

    def init(self, models: Models, prompt: Prompt, slots: int) -> Any:
        """Returns the state after the prompt; `slots` is the capacity of caches, in tokens.

        The first axis of every leaf must be b, and its other axes must depend on neither b nor t,
        because the batcher replaces the state of a finished row by that of a new prompt.
        """
        ...

    def propose(self, models: Models, context: Context, state: Any) -> tuple[Proposal, Any]:
        """Returns the next tree of each row, and the new state."""
        ...

    def update(self, models: Models, state: Any, verified: Verified) -> Any:
        """Returns the state after a round.

        Rows without committed tokens are finished, and their state is never read again.
        """
        ...
