"""The tables of a draft vocabulary in files: `d2t` and `t2d`, which hold the same information.

`d2t[i]` is an offset: entry i of the draft vocabulary is the target's token `i + d2t[i]`. `t2d`
marks the target's tokens that have an entry. In memory there is only `d2t`, int32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from eagle_jax.checkpoint.files import LazyTensors
from eagle_jax.checkpoint.lazy_tensor import LazyTensor, lazily

COVERAGE = "draft_vocab_coverage"
"""Key, in `config.json`, of the share of counted tokens that the draft vocabulary contains."""


def size_of(config: Any) -> int | None:
    """Returns the size of the draft vocabulary, or None if the draft uses the target's."""
    return getattr(config, "draft_vocab_size", None)


def pop_tables(tensors: LazyTensors) -> list[np.ndarray | None]:
    """Removes `d2t` and `t2d` from `tensors` and returns them; None for a missing one."""
    found = [tensors.pop(name, None) for name in ("d2t", "t2d")]
    return [None if table is None else np.asarray(table) for table in found]


def checked_offsets(
    directory: Path, config: Any, offsets: np.ndarray | None, members: np.ndarray | None
) -> LazyTensor:
    """Returns the checked `d2t`, int32; zeros if the draft has the whole vocabulary and no table.

    Args:
        directory: the draft's directory, for messages.
        config: the draft's configuration, with `vocab_size` and `draft_vocab_size`.
        offsets, members: `d2t` and `t2d` as read from the file.

    Raises:
        ValueError: `d2t` is missing or wrong, or the two contradict each other.
    """
    draft_vocab, vocab = size_of(config) or 0, config.vocab_size
    if offsets is None and draft_vocab < vocab:
        raise ValueError(
            f"{directory}: has no d2t, though draft_vocab_size={draft_vocab} is less than "
            f"vocab_size={vocab}; export the draft again with it"
        )
    if offsets is None:
        offsets = np.zeros(draft_vocab, np.int64)
    tokens = target_tokens(str(directory), config, offsets)
    if members is not None:
        marked = np.flatnonzero(members) if members.shape == (vocab,) else np.zeros(0, int)
        if not np.array_equal(marked, np.sort(tokens)):
            raise ValueError(
                f"{directory}: t2d marks other tokens than d2t lists; export the draft again"
            )
    return lazily(offsets.astype(np.int32))


def target_tokens(where: str, config: Any, offsets: np.ndarray) -> np.ndarray:
    """Returns the target's token of every entry of the draft vocabulary.

    Raises:
        ValueError: `d2t` has a wrong type or shape, repeats a token, or maps an entry to a token
            outside the vocabulary.
    """
    draft_vocab, vocab = size_of(config) or 0, config.vocab_size
    remedy = "export the draft again"
    if offsets.shape != (draft_vocab,) or not np.issubdtype(offsets.dtype, np.integer):
        raise ValueError(
            f"{where}: d2t is {offsets.dtype} of shape {offsets.shape}, "
            f"not integers of shape {(draft_vocab,)}; {remedy}"
        )
    tokens = np.arange(draft_vocab) + offsets.astype(np.int64)
    for wrong in np.flatnonzero((tokens < 0) | (tokens >= vocab))[:1]:
        raise ValueError(
            f"{where}: d2t maps entry {wrong} to token {tokens[wrong]}, outside "
            f"vocab_size={vocab}; {remedy}"
        )
    unique, counts = np.unique(tokens, return_counts=True)
    for token in unique[counts > 1][:1]:
        raise ValueError(f"{where}: d2t lists token {token} more than once; {remedy}")
    return tokens


def lacks(settings: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Returns the names of what a draft with its own vocabulary should have but lacks."""
    own = {name.removeprefix("model.") for name in names}
    missing = [] if own & {"d2t", "draft_id_to_target_id"} else ["d2t"]
    return missing if COVERAGE in settings else [*missing, COVERAGE]
