"""Stop strings: the same answer however its tokens arrive, and nothing shown that is taken back."""

import itertools

import decoding
import pytest

from eagle_jax.decode.sampling.stop import Answer

TEXT = "cabbadabbacabhdd"


def naive(text: str, stop: tuple[str, ...], least: int = 0) -> tuple[str, int, bool]:
    """Text, tokens, and whether it was stopped, of an answer of one letter a token."""
    for end in range(1, len(text) + 1):
        ending = [s for s in stop if text[:end].endswith(s)]
        if ending and end >= least:
            return text[: end - max(map(len, ending))], end, True
    return text, len(text), False


@pytest.mark.parametrize(
    "stop", [("bb",), ("abba", "ba"), ("cabh",), ("abbac", "dd"), ("x",), ("bad", "cab"), ("c",)]
)
@pytest.mark.parametrize("least", [0, 4])
def test_chunks_change_nothing(stop: tuple[str, ...], least: int) -> None:
    """Catches a stop string across two chunks, text shown that belongs to one, text held back at
    the end, and a later stop string that wins over an earlier one."""
    tokenizer = decoding.lettered_pair().tokenizer
    assert tokenizer is not None
    ids, wanted = tokenizer.encode(TEXT), naive(TEXT, stop, least)
    assert len(ids) == len(TEXT)
    for size in (1, 2, 3, 5, len(ids)):
        answer, shown = Answer(tokenizer, stop, least), ""
        for first in range(0, len(ids), size):
            shown += answer.feed(ids[first : first + size], first + size >= len(ids)) or ""
            assert wanted[0].startswith(shown)
        assert (shown, answer.tokens, answer.stopped) == wanted, size


def test_only_what_may_become_a_stop_string_waits() -> None:
    """Catches text that is held back for nothing."""
    answer = Answer(decoding.lettered_pair().tokenizer, ["abba", "bbc"])
    said = [answer.feed([id]) for id in [2, 0, 1, 3, 1, 1, 0]]  # c a b d b b a
    assert said == ["c", "", "", "abd", "", "", "bb"]
    assert answer.feed([], last=True) == "a"


def test_all_short_texts() -> None:
    """Every text of three letters up to length 6, every chunking, against the naive rule."""
    tokenizer = decoding.lettered_pair().tokenizer
    stop = ("aba", "bb")
    for letters in itertools.product("ab", repeat=5):
        text = "".join(letters)
        ids, wanted = [ord(x) - ord("a") for x in text], naive(text, stop)
        for cut in range(1, 5):
            answer = Answer(tokenizer, stop)
            shown = (answer.feed(ids[:cut]) or "") + (answer.feed(ids[cut:], last=True) or "")
            assert (shown, answer.tokens, answer.stopped) == wanted, (text, cut)


def test_without_stop_strings_or_tokenizer() -> None:
    assert Answer(None).feed([1, 2]) is None
    answer = Answer(decoding.lettered_pair().tokenizer)
    assert answer.feed([0, 1]) == "ab" and answer.tokens == 2
