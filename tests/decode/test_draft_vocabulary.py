"""EAGLE-1 over a part of the vocabulary: the texts stay, and so does a draft that knows all."""

import functools
import re

import decoding
import pytest

from eagle_jax import fingerprint
from eagle_jax.decode import DynamicTree, Eagle, generate, static_tree
from eagle_jax.decode.method import Method
from eagle_jax.params import Params

SETTINGS: dict[str, dict] = {"greedy": {}, "sampled": {"temperature": 1.0}}
# Greedy, what is coupled and what is plain are the same.
CASES = [
    ("eagle chain", "greedy"),
    ("eagle2", "greedy"),
    ("eagle chain", "sampled"),
    ("eagle gaps", "sampled"),
    ("eagle2", "sampled"),
    ("eagle2 plain", "sampled"),
    ("eagle lookup", "sampled"),
]
# Neither in order nor the first ones: an entry is no token. Ranks of the trees here go up to 3.
SOME = (9, 2, 4, 10, 7, 5)
ALL = tuple(reversed(range(decoding.VOCAB)))


@functools.cache
def pair(tokens: tuple[int, ...] | None) -> Params:
    trained = decoding.trained_pair(steps=250)
    return trained if tokens is None else decoding.with_vocabulary(trained, tokens)


@functools.cache
def run(name: str, setting: str, tokens: tuple[int, ...] | None = None):
    """Texts, rounds of every row, and tokens a round."""
    options = SETTINGS[setting] | {"seed": decoding.SEEDS, "max_new_tokens": decoding.NEW}
    method = decoding.METHODS[name]
    out = generate(pair(tokens), decoding.PROMPTS, method=method, **options)
    return decoding.lists(out.tokens), out.statistics.rounds, out.statistics.tau


@pytest.mark.parametrize(("method", "setting"), CASES)
def test_texts_are_vanillas(method: str, setting: str) -> None:
    """Catches a draft that leaks into the text, and one that is never right."""
    texts, _, tau = run(method, setting, SOME)
    assert texts == run("vanilla", setting)[0]
    assert tau > 1.15


@pytest.mark.parametrize(("method", "setting"), [("eagle2", "greedy"), ("eagle chain", "sampled")])
def test_all_tokens_are_the_plain_head(method: str, setting: str) -> None:
    """Catches entries that are taken for tokens, in what is drafted or in the noise, and scores of
    another scale."""
    whole = run(method, setting)
    assert run(method, setting, tuple(range(decoding.VOCAB))) == whole
    assert run(method, setting, ALL) == whole
    assert run(method, setting, SOME)[1] != whole[1]


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (Eagle(DynamicTree(2, 7, 8)), "tree k=7: the draft knows 6 tokens; use fewer"),
        (Eagle(static_tree([[0], [6]])), "tree rank 6: the draft knows 6 tokens; use lower ranks"),
    ],
)
def test_trees_that_are_too_wide(method: Method, said: str) -> None:
    """Catches limits of the target's vocabulary, which a draft of six tokens does not have."""
    with pytest.raises(ValueError, match=re.escape(said)):
        generate(pair(SOME), [[1, 2]], method=method, max_new_tokens=2)
    method.check(pair(None))
    Eagle(DynamicTree(2, 6, 8)).check(pair(SOME))


def test_a_tuning_is_of_one_vocabulary() -> None:
    """Catches a tuning that is used for other tokens: their acceptance is another."""
    others = [None, SOME, (*SOME[:5], 6), ALL]
    assert len({fingerprint.of_params(pair(tokens)) for tokens in others}) == len(others)
