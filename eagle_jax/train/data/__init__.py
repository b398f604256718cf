"""Turns conversations into packed rows, and packed rows into batches."""

from eagle_jax.train.data.batches import (
    Batch,
    Features,
    batch_of,
    rows,
    step_rows,
    texts,
    train_iterator,
    validation_batches,
)
from eagle_jax.train.data.packing import Example, Row, best_fit, cut, pack
from eagle_jax.train.data.prepared import COUNTS, FORMAT, SPLIT, prepare, token_counts

__all__ = [
    "COUNTS",
    "FORMAT",
    "SPLIT",
    "Batch",
    "Example",
    "Features",
    "Row",
    "batch_of",
    "best_fit",
    "cut",
    "pack",
    "prepare",
    "rows",
    "step_rows",
    "texts",
    "token_counts",
    "train_iterator",
    "validation_batches",
]
