"""Decoding: `generate` and `stream`, every method through the one engine.

params = eagle_jax.load("tiny")
out = eagle_jax.decode.generate(params, "What is a prime number?", method="eagle")
print(out.text, out.statistics.tau)
"""

from types import ModuleType

from eagle_jax import lazy
from eagle_jax.decode.acceptance import Exact, Rejection, Typical
from eagle_jax.decode.batching.batcher import Batcher, Piece
from eagle_jax.decode.generate import generate, stream
from eagle_jax.decode.methods.eagle import Eagle
from eagle_jax.decode.methods.eagle_lookup import EagleLookup
from eagle_jax.decode.methods.lookahead import Lookahead
from eagle_jax.decode.methods.medusa import Medusa
from eagle_jax.decode.methods.prompt_lookup import PromptLookup
from eagle_jax.decode.methods.recycling import Recycling
from eagle_jax.decode.methods.speculative import Speculative
from eagle_jax.decode.methods.vanilla import Vanilla
from eagle_jax.decode.registry import METHODS, default_tree
from eagle_jax.decode.session import Generation, Session, Statistics
from eagle_jax.decode.tree import (
    DynamicTree,
    StaticTree,
    best_tree,
    chain,
    named_tree,
    static_tree,
)

__all__ = [
    "METHODS",
    "Batcher",
    "DynamicTree",
    "Eagle",
    "EagleLookup",
    "Exact",
    "Generation",
    "Lookahead",
    "Medusa",
    "Piece",
    "PromptLookup",
    "Recycling",
    "Rejection",
    "Session",
    "Speculative",
    "StaticTree",
    "Statistics",
    "Typical",
    "Vanilla",
    "best_tree",
    "chain",
    "default_tree",
    "generate",
    "named_tree",
    "static_tree",
    "stream",
]


def __getattr__(name: str) -> ModuleType:
    return lazy.submodule(__name__, name)


def __dir__() -> list[str]:
    return lazy.names(__name__)
