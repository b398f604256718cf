"""Methods by name: what `method="eagle"` stands for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import jax

from eagle_jax.decode.method import Method
from eagle_jax.decode.methods.eagle import Eagle
from eagle_jax.decode.methods.eagle_lookup import EagleLookup
from eagle_jax.decode.methods.lookahead import Lookahead
from eagle_jax.decode.methods.medusa import Medusa
from eagle_jax.decode.methods.prompt_lookup import PromptLookup
from eagle_jax.decode.methods.recycling import Recycling
from eagle_jax.decode.methods.speculative import Speculative
from eagle_jax.decode.methods.vanilla import Vanilla
from eagle_jax.decode.tree import (
    MC_SIM_7B_63,
    DynamicTree,
    StaticTree,
    static_tree,
)

AUTO: Literal["auto"] = "auto"

# One level wide on CPUs, where every draft step costs a third of a target pass and every verified
# token costs arithmetic (python -m eagle_jax.evaluate compares); the paper's tree elsewhere.
_CPU_TREE = static_tree([[0], [1], [2]])


def default_tree() -> StaticTree:
    """The tree that `method="eagle"` uses on this backend."""
    return _CPU_TREE if jax.default_backend() == "cpu" else MC_SIM_7B_63


METHODS: Mapping[str, Callable[[], Method]] = {
    "vanilla": Vanilla,
    "eagle": lambda: Eagle(default_tree()),
    "eagle2": lambda: Eagle(DynamicTree()),
    "eagle3": lambda: Eagle(DynamicTree(depth=8), head="eagle3"),
    "eagle_lookup": lambda: EagleLookup(Eagle(default_tree())),
    "medusa": Medusa,
    "speculative": Speculative,
    "lookahead": Lookahead,
    "prompt_lookup": PromptLookup,
    "recycling": Recycling,
}


def unknown(name: str) -> str:
    """What to say of a name that is no method's."""
    return f"method={name!r}: unknown; use one of {', '.join((*METHODS, AUTO))}"
