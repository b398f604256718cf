"""Draft vocabularies: which tokens are chosen, and from which text they are counted."""

import json
import re

import numpy as np
import pytest
import tiny_run

from eagle_jax.text import Tokenizer
from eagle_jax.vocabulary import draft_vocabulary, token_counts


def test_the_most_frequent_tokens() -> None:
    """Ties, order, offsets, or a required token pushed out by a frequent one."""
    counts = np.array([5, 0, 7, 7, 0, 1, 5, 5])
    d2t, coverage = draft_vocabulary(counts, 4, required=(4,))
    assert d2t.dtype == np.int32
    assert list(np.arange(4) + d2t) == [0, 2, 3, 4]
    assert coverage == (5 + 7 + 7) / 30
    everything, whole = draft_vocabulary(counts, 8)
    assert not everything.any() and whole == 1.0
    assert draft_vocabulary(np.zeros(3, int), 2)[1] == 0.0


def test_room_for_the_end_of_an_answer() -> None:
    """A draft that can never propose the end, built without a word."""
    said = "size=1: the tokens that end an answer alone are 2; make it larger"
    with pytest.raises(ValueError, match=f"^{said}$"):
        draft_vocabulary(np.ones(5, int), 1, required=(3, 4), field="size")


def test_counts_are_of_answers(tmp_path) -> None:
    """Catches tokens of users or of the template, the end token left out, and a file passed over.

    The tokenizer's ids are bytes; what training counts, `tests/train/test_runs.py` compares.
    """
    size = tiny_run.write_tokenizer(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    files = []
    for name, answer in (("a", "aab"), ("b", "b")):
        turns = [("user", "xyz"), ("assistant", answer), ("user", "a"), ("assistant", "")]
        messages = [{"role": role, "content": content} for role, content in turns]
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text(json.dumps({"messages": messages}) + "\n")
    counts = token_counts(files, tokenizer, size + 3)
    a, b = tokenizer.encode("ab")
    assert counts.shape == (size + 3,) and counts.dtype == np.int64
    found = {int(token): int(counts[token]) for token in np.flatnonzero(counts)}
    assert found == {a: 2, b: 2, tokenizer.eos_ids[0]: 4}
    assert not token_counts([], tokenizer, size).any()
    said = f"tokenizer: has token {tokenizer.eos_ids[0]}, but the model has vocab_size=100; use the"
    with pytest.raises(ValueError, match=re.escape(said)):
        token_counts(files, tokenizer, 100)
