"""Decoding: `generate` and `stream`, every method through the one engine.

params = eagle_jax.load("tiny")
out = eagle_jax.decode.generate(params, "What is a prime number?", method="eagle")
print(out.text, out.statistics.tau)
"""

from eagle_jax.decode.acceptance import Exact, Rejection, Typical
from eagle_jax.decode.batching.batcher import Batcher, Piece
from eagle_jax.decode.generate import generate, stream
from eagle_jax.decode.generation import Generation, Statistics, TokenLogprob
from eagle_jax.decode.methods.eagle import Eagle
from eagle_jax.decode.methods.eagle_lookup import EagleLookup
from eagle_jax.decode.methods.lookahead import Lookahead
from eagle_jax.decode.methods.medusa import Medusa
from eagle_jax.decode.methods.prompt_lookup import PromptLookup
from eagle_jax.decode.methods.recycling import Recycling
from eagle_jax.decode.methods.speculative import Speculative
from eagle_jax.decode.methods.vanilla import Vanilla
from eagle_jax.decode.registry import METHODS, default_tree
from eagle_jax.decode.sampling.params import SamplingParams
from eagle_jax.decode.session import Session
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
