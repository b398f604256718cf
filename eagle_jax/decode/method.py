"""What a decoding method is: a proposer of token trees of one fixed shape.

A method is a frozen dataclass of static settings (hashable, so that it is a jit key) with three
pure functions. Its own state is any pytree of fixed shapes.
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
        target: the target.
        draft: the module of the kind that the method asked for (`eagle_jax.drafters`).
    """

    target: Transformer
    draft: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompt:
    """What the target's pass over the prompt leaves to a method.

    Attributes:
        tokens: [b, t] right-padded prompts.
        length: [b] their lengths.
        features: [b, t, ·] what the method's draft reads of the target's pass (its `features`), if
            it reads anything. The last prompt token's are not known yet to a round: it is the first
            round's root.
    """

    tokens: Tokens
    length: Int[Array, " b"]
    features: Hidden | None


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
        seeds: [b] what the noise comes from, for methods that need noise of their own.
        longest: n, nodes of the longest path, root included; static.
    """

    tokens: Int[Array, "b c"]
    length: Int[Array, " b"]
    seeds: UInt32[Array, " b"]
    noise: Float[Array, "b n v"] | None
    sampling: Sampling
    longest: int = dataclasses.field(metadata={"static": True})

    def root(self) -> Int[Array, " b"]:
        """The last committed token of each row: the root of every tree."""
        return jnp.take_along_axis(self.tokens, self.length[:, None] - 1, 1, mode="clip")[:, 0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Verified:
    """The target's verdict on a proposal.

    Attributes:
        proposal: what was scored.
        output: the target's pass over every node.
        logits: [b, t, v] of every node.
        targets: [b, t] the target's token after every node, drawn with its position's noise.
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
        path: [b, n] its nodes by depth, root first; the root again past `count`.
        count: [b] accepted drafted tokens, 0 to n - 1.
        emitted: [b, n] tokens to commit: `count` accepted ones, then the bonus token; what follows
            is meaningless.
    """

    path: Int[Array, "b n"]
    count: Int[Array, " b"]
    emitted: Int[Array, "b n"]


@runtime_checkable
class Rule(Protocol):
    """How a scored proposal is judged; see `eagle_jax.decode.acceptance`.

    `lossless`: answers have the target's distribution. `seeded`: they are vanilla's answer to the
    same seed.
    """

    lossless: ClassVar[bool]
    seeded: ClassVar[bool]

    def __call__(
        self, proposal: Proposal, logits: Logits, targets: Int[Array, "b t"], context: Context
    ) -> Accepted:
        """Judges `proposal`.

        Takes the target's processed logits (`Sampling.process`) and its own token after every node.
        """
        ...


@runtime_checkable
class Method(Protocol):
    """A proposer; all properties are static.

    `nodes` is t, `depth` the longest draft (n - 1), `draft` the kind of draft that it reads, if
    any, `rule` how its proposals are judged.
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
        """State after the prompt; `slots` is the capacity for caches over committed tokens.

        Every leaf leads with b, and its other axes depend on neither b nor t: the batcher puts a
        new prompt's state in the place of a finished row's.
        """
        ...

    def propose(self, models: Models, context: Context, state: Any) -> tuple[Proposal, Any]:
        """The next tree of each row."""
        ...

    def update(self, models: Models, state: Any, verified: Verified) -> Any:
        """State after a round; rows with nothing committed are finished and never read again."""
        ...
