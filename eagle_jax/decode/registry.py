"""Decoding methods by name, such as `method="eagle"`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Literal

from eagle_jax.decode.method import Method
from eagle_jax.drafters import registry
from eagle_jax.drafters.spec import resolve

AUTO: Literal["auto"] = "auto"

# Methods that do not belong to a drafter. They are references, not objects, because some of them
# import drafters, which import this package.
_VANILLA = {"vanilla": "eagle_jax.decode.methods.vanilla:Vanilla"}
_OTHERS = {
    "eagle_lookup": "eagle_jax.decode.methods.eagle_lookup:eagle_lookup",
    "lookahead": "eagle_jax.decode.methods.lookahead:Lookahead",
    "prompt_lookup": "eagle_jax.decode.methods.prompt_lookup:PromptLookup",
    "recycling": "eagle_jax.decode.methods.recycling:Recycling",
}


class _Methods(Mapping[str, Callable[[], Method]]):
    """A mapping from method names, including those of all drafters, to functions without arguments.

    Each function returns the method with its default settings.
    """

    def _places(self) -> dict[str, str]:
        return {**_VANILLA, **registry.methods(), **_OTHERS}

    def __getitem__(self, name: str) -> Callable[[], Method]:
        return resolve(self._places()[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._places())

    def __len__(self) -> int:
        return len(self._places())


METHODS: Mapping[str, Callable[[], Method]] = _Methods()


def unknown(name: str) -> str:
    """Returns the error message for an unknown method name."""
    return f"method={name!r}: unknown; use one of {', '.join((*METHODS, AUTO))}"
