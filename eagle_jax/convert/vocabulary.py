"""The draft vocabulary that a conversion gives to an EAGLE-1 head."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eagle_jax.checkpoint import hf
from eagle_jax.convert.source import Source, choose_draft
from eagle_jax.drafters import draft_vocabulary as vocabularies
from eagle_jax.drafters import registry


@dataclasses.dataclass(frozen=True)
class DraftVocabulary:
    """A draft vocabulary that the EAGLE-1 head gets: offsets `d2t`, and the coverage."""

    offsets: np.ndarray
    coverage: float

    def said(self) -> dict[str, Any]:
        return {"draft_vocab_size": len(self.offsets), vocabularies.COVERAGE: self.coverage}


def check_vocabulary(
    layout: str, kind: str | None, size: int | None, text: Sequence[str | Path]
) -> None:
    """Raises ValueError if a draft vocabulary cannot be made with these arguments of `convert`."""
    if size is None:
        if text:
            raise ValueError(
                f"text={str(text[0])!r}: is read for a draft vocabulary; give its size with "
                "--draft-vocabulary, or leave --text out"
            )
        return
    where = f"draft_vocabulary={size}"
    if size < 1:
        raise ValueError(f"{where}: must be at least 1")
    if not text:
        raise ValueError(f"{where}: its tokens are counted in a text; give conversations as --text")
    if layout not in ("hf", "native"):
        raise ValueError(f"{where}: format {layout!r} has no place for it; use 'hf' or 'native'")
    if kind is not None and kind not in _shortening():
        raise ValueError(
            f"{where}: is for heads of kind {_or(_shortening())}, not {kind!r}; leave --kind out"
        )


def _shortening() -> list[str]:
    """The kinds of drafts that can get a draft vocabulary after training."""
    return [kind for kind, spec in registry.specs().items() if spec.checkpoint().shortens]


def _or(kinds: Sequence[str]) -> str:
    return " or ".join(map(repr, kinds))


def shortened(source: Source) -> str:
    """The kind of the source's draft that gets a draft vocabulary."""
    kinds = [hf.kind(directory) for directory in source.drafts]
    return next((kind for kind in _shortening() if kind in kinds), _shortening()[0])


def count_vocabulary(source: Source, size: int, text: Sequence[str | Path]) -> DraftVocabulary:
    """The tokens that answers have most often, for a draft of the source."""
    from eagle_jax.text import Tokenizer
    from eagle_jax.vocabulary import draft_vocabulary, token_counts

    where = f"draft_vocabulary={size}"
    kinds = sorted({hf.kind(directory) for directory in source.drafts})
    if kinds and not set(kinds) & set(_shortening()):
        raise ValueError(
            f"{where}: is for heads of kind {_or(_shortening())}, the source has "
            f"{', '.join(kinds)}; give such a head"
        )
    head = choose_draft(source, shortened(source))
    if source.target is None:
        raise ValueError(
            f"{where}: {head} has no tokenizer to count with; give its target with --target"
        )
    config, _ = hf.open_draft(head)
    hf.check_fit(hf.open_target(source.target)[0], config, head)
    own = vocabularies.size_of(config)
    if own is not None:
        raise ValueError(
            f"{where}: {head} has a draft vocabulary of {own} tokens; give the head that it was "
            "made from"
        )
    if size > config.vocab_size:
        raise ValueError(f"{where}: the target has {config.vocab_size} tokens; use fewer")
    tokenizer = Tokenizer.load(source.target)
    counts = token_counts(text, tokenizer, config.vocab_size)
    if not np.delete(counts, list(tokenizer.eos_ids)).any():
        raise ValueError(
            f"text={', '.join(map(str, text))}: has no words of an assistant; give conversations "
            "with answers"
        )
    return DraftVocabulary(*draft_vocabulary(counts, size, tokenizer.eos_ids, "draft_vocabulary"))
