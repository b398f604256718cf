"""Decoding: `generate` and `stream` run every method through one engine.

params = eagle_jax.load("tiny")
out = eagle_jax.decode.generate(params, "What is a prime number?", method="eagle")
print(out.text, out.statistics.tau)
"""

from typing import TYPE_CHECKING, Any

from eagle_jax import lazy
from eagle_jax.decode.acceptance import Exact, Rejection, Typical
from eagle_jax.decode.batching.batcher import Batcher, Piece
from eagle_jax.decode.generate import generate, stream
from eagle_jax.decode.generation import Generation, Statistics, TokenLogprob
from eagle_jax.decode.methods.lookahead import Lookahead
from eagle_jax.decode.methods.prompt_lookup import PromptLookup
from eagle_jax.decode.methods.recycling import Recycling
from eagle_jax.decode.methods.vanilla import Vanilla
from eagle_jax.decode.registry import METHODS
from eagle_jax.decode.sampling.params import SamplingParams
from eagle_jax.decode.session import Session
from eagle_jax.decode.tree import DynamicTree, StaticTree, best_tree, chain, named_tree, static_tree
from eagle_jax.drafters.spec import resolve

if TYPE_CHECKING:
    from eagle_jax.decode.methods.eagle_lookup import EagleLookup
    from eagle_jax.drafters.eagle.method import Eagle, default_tree
    from eagle_jax.drafters.medusa.method import Medusa
    from eagle_jax.drafters.model.method import Speculative

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
    "SamplingParams",
    "Session",
    "Speculative",
    "StaticTree",
    "Statistics",
    "TokenLogprob",
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

# Methods with a drafter import this package, so they are imported on first use.
_DRAFTING = {
    "Eagle": "eagle_jax.drafters.eagle.method:Eagle",
    "EagleLookup": "eagle_jax.decode.methods.eagle_lookup:EagleLookup",
    "Medusa": "eagle_jax.drafters.medusa.method:Medusa",
    "Speculative": "eagle_jax.drafters.model.method:Speculative",
    "default_tree": "eagle_jax.drafters.eagle.method:default_tree",
}


def __getattr__(name: str) -> Any:
    if name in _DRAFTING:
        return resolve(_DRAFTING[name])
    return lazy.submodule(__name__, name)


def __dir__() -> list[str]:
    return sorted({*lazy.names(__name__), *_DRAFTING})
