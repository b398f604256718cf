"""Settings that cannot work with these models: one line each, before anything is compiled."""

import dataclasses
import re

import decoding
import pytest

from eagle_jax.decode import (
    DynamicTree,
    Eagle,
    Lookahead,
    Medusa,
    PromptLookup,
    Recycling,
    Rejection,
    Speculative,
    Typical,
    chain,
    generate,
    static_tree,
)
from eagle_jax.decode.method import Method
from eagle_jax.decode.tree import StaticTree, named_tree

# Vocabulary 11, an EAGLE-3 draft that knows 7 tokens, three Medusa heads.
WRONG: dict[str, tuple[Method, str]] = {
    "k": (Eagle(DynamicTree(2, 12, 12)), "tree k=12: the draft knows 11 tokens; use fewer"),
    "k, eagle3": (
        Eagle(DynamicTree(2, 8, 8), head="eagle3"),
        "tree k=8: the draft knows 7 tokens; use fewer",
    ),
    "rank": (
        Eagle(static_tree([[0], [1], [11]])),
        "tree rank 11: the draft knows 11 tokens; use lower ranks",
    ),
    "rank, eagle3": (
        Eagle(static_tree([[0], [0, 7]]), head="eagle3"),
        "tree rank 7: the draft knows 7 tokens; use lower ranks",
    ),
    "no node": (Eagle(StaticTree(())), "tree=(): no drafted node; give at least one path"),
    "sharpness": (Eagle(sharpness=0.0), "sharpness=0.0: must be"),
    "sharpness, negative": (Eagle(DynamicTree(), sharpness=-1.0), "sharpness=-1.0: must be"),
    "sharpness, nan": (Eagle(sharpness=float("nan")), "sharpness=nan: must be"),
    "sharpness, inf": (Eagle(sharpness=float("inf")), "sharpness=inf: must be"),
    "confidence": (Eagle(confidence=0.0), "confidence=0.0: must be a number from 0.001 to 1000.0"),
    "confidence, large": (Eagle(confidence=1e39), "confidence=1e+39: must be"),
    "confidence, text": (Eagle(confidence="2"), "confidence='2': must be"),  # type: ignore[arg-type]
    "confidence, bool": (Eagle(confidence=True), "confidence=True: must be"),
    "heads": (Medusa(chain(4)), "tree of depth 4: the draft has 3 heads; use a tree of depth 1 to"),
    "no head": (Medusa(StaticTree(())), "tree of depth 0: the draft has 3 heads; use a tree"),
    "rank, medusa": (
        Medusa(static_tree([[0], [11]])),
        "tree rank 11: the vocabulary has 11 tokens",
    ),
    "dynamic, medusa": (Medusa(DynamicTree(2, 2, 2)), "tree=DynamicTree(depth=2"),  # pyright: ignore[reportArgumentType]
    "rejection, medusa": (Medusa(chain(2), rule=Rejection()), "rule=Rejection()"),
    "dynamic, recycling": (Recycling(DynamicTree(2, 2, 2)), "tree=DynamicTree(depth=2"),  # pyright: ignore[reportArgumentType]
    "nodes, lookahead": (Lookahead(ngram=9999), "139972 nodes to depth 10003; a round takes at"),
    "depth, dynamic": (Eagle(DynamicTree(2000, 2, 59)), "60 nodes to depth 2000; a round takes at"),
    "nodes, lookup": (PromptLookup(length=2000), "2001 nodes to depth 2000; a round takes at"),
    "length": (Speculative(0), "length=0: must be a whole number, at least 1"),
}


@pytest.mark.parametrize(("method", "said"), WRONG.values(), ids=WRONG)
def test_errors(method: Method, said: str) -> None:
    """Catches a clamped index, which drafts nonsense silently, and a traceback from inside jit."""
    with pytest.raises(ValueError, match=re.escape(said)) as info:
        generate(decoding.random_pair(), [[1, 2]], method=method, max_new_tokens=2)
    assert "\n" not in str(info.value)


def test_half_a_token_cannot_be_drafted() -> None:
    """Catches a TypeError from inside jit. (The tests' type checker stops it before generate.)"""
    with pytest.raises(ValueError, match=re.escape("length=2.5: must be a whole number")):
        Speculative(2.5).check(decoding.random_pair())  # pyright: ignore[reportArgumentType]


def test_a_chain_has_an_end() -> None:
    """Catches a tree whose mask takes minutes to build."""
    with pytest.raises(ValueError, match=re.escape("chain depth=99999: must be from 1 to 1023")):
        named_tree("chain-99999")


def test_a_missing_draft_is_named() -> None:
    """Catches a KeyError, and a message that does not say what to load."""
    pair = dataclasses.replace(decoding.random_pair(), drafts={})
    for method in (Eagle(), Eagle(head="eagle3"), Medusa(), Speculative()):
        with pytest.raises(ValueError, match=f"needs a draft of kind '{method.draft}'") as info:
            generate(pair, [[1, 2]], method=method, max_new_tokens=2)
        assert "\n" not in str(info.value)


def test_the_largest_settings_that_fit_are_allowed() -> None:
    """Catches limits that are one too strict."""
    pair = decoding.random_pair()
    for method in (
        Eagle(DynamicTree(1, 11, 11)),
        Eagle(DynamicTree(2, 7, 56), head="eagle3"),
        Eagle(static_tree([[10]])),
        Eagle(static_tree([[6]]), head="eagle3"),
        Medusa(static_tree([[0], [0, 0], [0, 0, 10]])),
        Medusa(chain(3), rule=Typical()),
        Speculative(1, rule=Rejection()),
    ):
        method.check(pair)
        assert hash(method) == hash(dataclasses.replace(method))


def test_trees_are_counted_like_their_envelope() -> None:
    """Catches a method that reports another size than its tree has: the engine allocates by it."""
    tree = named_tree("dynamic-4-3-9")
    assert (Eagle(tree).nodes, Eagle(tree).depth) == (10, 4)
    assert (Speculative(3).nodes, Speculative(3).depth) == (4, 3)
    assert (Medusa(chain(2)).nodes, Medusa(chain(2)).depth) == (3, 2)
    assert DynamicTree(1, 5, 5).pool == 5
