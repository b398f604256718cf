"""Prompt lookup: the match against a plain search, and what it drafts."""

import functools

import decoding
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eagle_jax.decode import PromptLookup, Vanilla, generate
from eagle_jax.decode.method import Method
from eagle_jax.decode.methods.prompt_lookup import lookup, suffix_match
from eagle_jax.testing import tiny_params

SETTINGS: dict[str, dict] = {
    "greedy": {},
    "plain": {"temperature": 1.0},
    "top_p": {"temperature": 0.7, "top_p": 0.9},
}
VARIANTS = [(False, False), (True, False), (False, True), (True, True)]  # latest, truncate


def search(
    text: list[int], longest: int, shortest: int, count: int, latest: bool, truncate: bool
) -> tuple[int, int, list[int]]:
    """Where the continuation starts, tokens matched, the continuation; or `len(text) - 1, 0, []`.

    Suffix by suffix, window by window, as the method is described.
    """
    for n in range(min(longest, len(text)), shortest - 1, -1):
        starts = [i + n for i in range(len(text) - n) if text[i : i + n] == text[-n:]]
        starts = [s for s in starts if truncate or s + count <= len(text)]
        if starts:
            start = starts[-1 if latest else 0]
            return start, n, text[start : start + count]
    return len(text) - 1, 0, []


@pytest.mark.parametrize(("longest", "shortest"), [(3, 1), (1, 1), (4, 2), (16, 5)])
@pytest.mark.parametrize(("latest", "truncate"), VARIANTS)
def test_match_equals_a_plain_search(
    longest: int, shortest: int, latest: bool, truncate: bool
) -> None:
    """Catches matches read from beyond the text or around its ends, and the suffix found itself."""
    rng = np.random.default_rng(longest)
    rows, capacity, count = 1200, 48, 5
    length = rng.integers(1, capacity + 1, rows)
    letters = rng.integers(1, 7, rows)  # one letter: every suffix matches everywhere
    tokens = rng.integers(0, 1000, (rows, capacity)) % letters[:, None]
    # Loops, for the long suffixes.
    period = rng.integers(1, 20, rows)
    looped = np.take_along_axis(tokens, np.arange(capacity)[None] % period[:, None], 1)
    tokens = np.where((np.arange(rows) % 2 == 0)[:, None], looped, tokens)

    match = functools.partial(
        suffix_match,
        max_ngram=longest,
        min_ngram=shortest,
        needed=1 if truncate else count,
        latest=latest,
    )
    args = jnp.asarray(tokens, jnp.int32), jnp.asarray(length, jnp.int32)
    start, matched, available = map(np.asarray, jax.jit(jax.vmap(match))(*args))
    drafted, again = map(
        np.asarray, lookup(*args, count, longest, shortest, latest=latest, truncate=truncate)
    )
    found = 0
    for row in range(rows):
        text = tokens[row, : length[row]].tolist()
        where, n, expected = search(text, longest, shortest, count, latest, truncate)
        assert (start[row], matched[row], again[row]) == (where, n, n)
        assert available[row] == (len(text) - where if n else 0)
        assert drafted[row, : len(expected)].tolist() == expected
        found += n > 0
    assert 300 < found < rows


def test_drafts_by_hand() -> None:
    """Catches a chain that starts one token off, and an unmatched row that drafts from nowhere."""
    text = jnp.array([[1, 2, 3, 1, 4, 1, 9, 9], [5, 6, 7, 9, 9, 9, 9, 9], [1, 2, 1, 2, 1, 9, 9, 9]])
    length = jnp.array([6, 3, 5])

    def drafts(**options: bool) -> list[list[int]]:
        return decoding.lists(lookup(text, length, 4, 3, **options)[0])

    # Row 0: `1` stood at 0 and 3. Row 2: `1 2 1` stood at 0, its continuation is the loop itself.
    assert drafts() == [[2, 3, 1, 4], [7, 7, 7, 7], [2, 1, 2, 1]]
    assert drafts(latest=True) == [[2, 3, 1, 4], [7, 7, 7, 7], [2, 1, 2, 1]]
    assert drafts(truncate=True) == [[2, 3, 1, 4], [7, 7, 7, 7], [2, 1, 2, 1]]
    assert drafts(latest=True, truncate=True) == [[4, 1, 4, 1], [7, 7, 7, 7], [2, 1, 2, 1]]


def run(method: Method, **options):
    pair = decoding.random_pair()
    options = {"seed": decoding.SEEDS, "max_new_tokens": decoding.NEW} | options
    return generate(pair, decoding.PROMPTS, method=method, **options)


@functools.cache
def vanilla(name: str) -> list[list[int]]:
    return decoding.lists(run(Vanilla(), **SETTINGS[name]).tokens)


@pytest.mark.parametrize("method", [PromptLookup(), PromptLookup(5, 2, 3, True, True)])
@pytest.mark.parametrize("name", SETTINGS)
def test_text_equals_vanilla(name: str, method: PromptLookup) -> None:
    """Catches drafted tokens, also those of rows without a match, that leak into the text."""
    assert decoding.lists(run(method, **SETTINGS[name]).tokens) == vanilla(name)


@pytest.mark.parametrize(("latest", "truncate"), VARIANTS)
def test_loops_are_found(latest: bool, truncate: bool) -> None:
    """Catches a chain that is never accepted: off by one position, or another row's."""
    target = tiny_params(decoding.target_config(), seed=3, scale=6.0)  # soon repeats itself
    method = PromptLookup(latest=latest, truncate=truncate)
    out = generate(target, decoding.PROMPTS, method=method, max_new_tokens=100)
    plain = generate(target, decoding.PROMPTS, method=Vanilla(), max_new_tokens=100)
    assert decoding.lists(out.tokens) == decoding.lists(plain.tokens)
    assert out.statistics.tau > 1.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 0}, "length=0: must be a whole number above 0"),
        ({"max_ngram": 2.0}, "max_ngram=2.0: must be a whole number above 0"),
        ({"min_ngram": 4}, "min_ngram=4: must be at most max_ngram, 3"),
    ],
)
def test_impossible_settings_are_named(settings: dict, message: str) -> None:
    """Catches settings that fail inside a trace, or that never find anything."""
    with pytest.raises(ValueError, match=message):
        PromptLookup(**settings)
