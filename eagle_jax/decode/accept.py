"""The one acceptance rule: follow the target's own tokens through the tree.

Lossless for every deterministic proposal: the emitted token after a node is always the target's
own (greedy, or drawn with that position's noise), a draft only decides how many are found in one
pass. Equal in law to the multi-round rule of EAGLE and SpecInfer with point-mass drafts.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from eagle_jax.decode.tree import Shape


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


def accept(
    tokens: Int[Array, "b t"], shape: Shape, targets: Int[Array, "b t"], longest: int
) -> Accepted:
    """Walk each row's tree from the root while a child carries the target's token.

    Args:
        tokens: drafted tokens; node 0 is the last committed one.
        shape: of the trees.
        targets: the target's token after each node.
        longest: n, nodes of the longest path, root included (static).
    """

    def one_row(tokens, parents, depth, ancestors, targets):
        matches = (tokens == targets[parents]).at[0].set(True)
        alive = jnp.all(matches[None, :] | ~ancestors, axis=1)
        # Siblings may repeat a token: the lowest index wins, and with it one well-defined path.
        best = jnp.argmax(jnp.where(alive, depth, -1))
        on_path = ancestors[best][None, :] & (depth[None, :] == jnp.arange(longest)[:, None])
        path = jnp.argmax(on_path, axis=1).astype(jnp.int32)
        return path, depth[best], targets[path]

    trees = (tokens, shape.parents, shape.depth, shape.ancestors, targets)
    return Accepted(*jax.vmap(one_row)(*trees))
