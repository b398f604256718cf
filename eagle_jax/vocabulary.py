"""Draft vocabularies: the tokens that a draft can propose, chosen by their frequency in answers.

A draft that scores fewer tokens takes less time. The target verifies with its whole vocabulary, so
the choice affects acceptance, but never the text.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eagle_jax.text import Tokenizer, encode_files


def token_counts(files: Sequence[str | Path], tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """Returns how often each token occurs in assistant turns, int64 [vocab_size].

    Args:
        files: JSONL or JSONL.gz files of conversations.
        tokenizer: the target's tokenizer.
        vocab_size: size of the target's vocabulary.

    Raises:
        ValueError: a file is wrong, or the tokenizer has tokens that the target lacks.
    """
    found: collections.Counter[int] = collections.Counter()
    for tokens, mask in encode_files(files, tokenizer):
        found.update(itertools.compress(tokens, mask))
    largest = max([*found, *tokenizer.eos_ids], default=0)
    if largest >= vocab_size:
        raise ValueError(
            f"tokenizer: has token {largest}, but the model has vocab_size={vocab_size}; use the "
            "model's own tokenizer"
        )
    counts = np.zeros(vocab_size, np.int64)
    counts[np.array([*found.keys()], int)] = [*found.values()]
    return counts


def draft_vocabulary(
    counts: np.ndarray,
    size: int,
    required: Sequence[int] = (),
    field: str = "draft_vocab_size",
) -> tuple[np.ndarray, float]:
    """Returns the most frequent tokens as offsets `d2t`, and the share of the text they cover.

    Args:
        counts: [V], the count of every token of the target's vocabulary.
        size: size of the draft vocabulary.
        required: tokens to include whatever their count, such as those that end an answer.
        field: the option that sets `size`, for error messages.

    Returns:
        `d2t`, int32 [size]: draft id i is token `i + d2t[i]`, in ascending order; and the coverage.

    Raises:
        ValueError: `size` is smaller than the number of required tokens.
    """
    needed = np.zeros(len(counts), bool)
    needed[list(required)] = True
    if size < needed.sum():
        raise ValueError(
            f"{field}={size}: the tokens that end an answer alone are {needed.sum()}; make it "
            "larger"
        )
    order = np.lexsort((np.arange(len(counts)), -counts, ~needed))  # the last key sorts first
    tokens = np.sort(order[:size])
    coverage = float(counts[tokens].sum() / max(1, counts.sum()))
    return (tokens - np.arange(size)).astype(np.int32), coverage
