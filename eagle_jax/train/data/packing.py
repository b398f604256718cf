"""Packing: conversations of any length into rows of exactly `t` tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

Row = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Example:
    """A conversation, or a part of a conversation that is longer than a sequence.

    Attributes:
        tokens: [n] int32.
        mask: [n] uint8, 1 on tokens of assistant turns.
    """

    tokens: np.ndarray
    mask: np.ndarray


def cut(tokens: Sequence[int], mask: Sequence[int], length: int) -> Iterator[Example]:
    """Cuts a conversation into examples of at most `length` tokens; nothing is dropped."""
    for first in range(0, len(tokens), length):
        yield Example(
            np.asarray(tokens[first : first + length], np.int32),
            np.asarray(mask[first : first + length], np.uint8),
        )


def pack(examples: Iterable[Example], length: int) -> Iterator[Row]:
    """Packs examples into rows, each example into the open row it fills best.

    Args:
        examples: examples of at most `length` tokens each; they may come out in another order.
        length: number of tokens `t` in a row.

    Yields:
        `tokens` int32 [t], `mask` uint8 [t] and `segment_ids` uint16 [t], 0 in padding.
    """
    examples = list(examples)
    # Files are often sorted by source. Shuffling first mixes all kinds of text in every batch.
    order = np.random.default_rng(0).permutation(len(examples))
    for members in best_fit([len(examples[i].tokens) for i in order], length):
        row = _empty_row(length)
        end = 0
        for segment, member in enumerate(members, start=1):
            example = examples[order[member]]
            span = slice(end, end := end + len(example.tokens))
            row["tokens"][span] = example.tokens
            row["mask"][span] = example.mask
            row["segment_ids"][span] = segment
        yield row


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Returns the item indices of each bin; an item goes into the open bin that it fills best."""
    bins: list[list[int]] = []
    open_bins: list[list[int]] = [[] for _ in range(capacity + 1)]  # bins by free space
    occupied = 0  # bit s is set while a bin has s free tokens; one bit scan finds the best fit
    for item, length in enumerate(lengths):
        fitting = occupied >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            index = open_bins[space].pop()
            if not open_bins[space]:
                occupied ^= 1 << space
        else:
            space, index = capacity, len(bins)
            bins.append([])
        bins[index].append(item)
        left = space - length
        open_bins[left].append(index)
        occupied |= 1 << left
    return bins


def _empty_row(length: int) -> Row:
    return {
        "tokens": np.zeros(length, np.int32),
        "mask": np.zeros(length, np.uint8),
        "segment_ids": np.zeros(length, np.uint16),
    }
