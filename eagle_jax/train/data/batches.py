"""Batches of prepared rows: shuffled for training, in order for validation.

grain reads the rows at random; its iterator state is a dictionary that can be checkpointed. Packing
is fixed and only rows are shuffled. Segments do not attend to each other, so a token's loss does
not depend on which segments share its row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from eagle_jax.config import DataConfig
from eagle_jax.text import Tokenizer
from eagle_jax.train.data.packing import Row
from eagle_jax.train.data.prepared import open_rows, prepare

Batch = dict[str, np.ndarray]


@runtime_checkable
class Features(Protocol):
    """Reads per-token arrays stored for prepared rows; see `eagle_jax.train.offline`."""

    def read(self, number: int, tokens: int) -> Row:
        """Returns a row's arrays [sequence_length, ...], zero after its first `tokens` tokens."""
        ...


@dataclasses.dataclass(frozen=True)
class _Joined:
    """Prepared rows, by number, each merged with its stored features."""

    rows: Any
    features: Features

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: Any) -> Row:
        row = self.rows[number]
        tokens = int(np.count_nonzero(row["segment_ids"]))
        return {**row, **self.features.read(int(number) % len(self), tokens)}


def train_iterator(
    config: DataConfig,
    *,
    features: Features | None = None,
    shard_index: int = 0,
    shard_count: int = 1,
) -> Any:
    """Returns an endless iterator of shuffled batches; every epoch has a new order.

    Args:
        config: the text and the batch shape; the text is prepared first if necessary.
        features: stored features to add to the rows; they do not change the order.
        shard_index, shard_count: this process and the number of processes that share a batch.

    Returns:
        A grain iterator (`next`, `get_state`, `set_state`, `close`) of batches with
        `b = batch_size / shard_count` rows (this process's share) and `t = sequence_length`.
        States are JSON and need the same batch size and number of workers. Close the iterator if
        it has workers. A batch has:

        - `tokens` int32 [b, t], 0 in padding;
        - `positions` int32 [b, t], from 0 in every segment;
        - `segment_ids` int32 [b, t], from 1 in every row, 0 in padding;
        - `loss_mask` float32 [b, t], 1 on tokens of assistant turns;
        - the arrays of `features`, [b, t, ...].

    Raises:
        ValueError: a field of the configuration or of the text is wrong.
    """
    import grain
    from absl import flags

    source = rows(config, features=features)[1]
    dataset = _batches(source, config, shard_index, shard_count).map(_columns)
    # Elements are whole batches, so a few are enough; grain's default buffers 500.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    batches = dataset.to_iter_dataset(options)
    if config.workers:
        # grain reads absl flags here and fails in a program that never parsed any.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        processes = grain.MultiprocessingOptions(
            num_workers=config.workers, per_worker_buffer_size=4
        )
        batches = batches.mp_prefetch(processes)
    return iter(batches)


def _batches(source: Any, config: DataConfig, shard_index: int, shard_count: int) -> Any:
    """Returns batches of `source` in training order: batch `n` belongs to step `n + 1`."""
    import grain

    share = _share(config, shard_index, shard_count)
    # Slice into shares last, so that a step has the same rows in the same order for any number of
    # processes.
    return (
        grain.MapDataset.source(source)
        .shuffle(seed=config.seed)
        .repeat()
        .batch(share, drop_remainder=True)
        .slice(slice(shard_index, None, shard_count))
    )


def step_rows(config: DataConfig, step: int) -> list[int]:
    """Returns the numbers of the prepared rows in the batch of step `step`.

    Args:
        config: as for `train_iterator`.
        step: a training step, from 1.

    Raises:
        ValueError: `step` is below 1, or a field of the configuration or of the text is wrong.
    """
    if step < 1:
        raise ValueError(f"step={step}: must be at least 1")
    numbers = range(len(open_rows(prepare(config.train, config, field="train"))))
    return [int(row) for row in _batches(numbers, config, 0, 1)[step - 1]]


def texts(config: DataConfig, rows: Iterable[int]) -> Iterator[dict[str, Any]]:
    """Yields one readable dictionary for each conversation in the given prepared rows.

    Args:
        config: as for `train_iterator`.
        rows: row numbers, as `step_rows` returns them.

    Yields:
        `row`, `segment` (its number in the row, from 1), `tokens` (their number), `trained` (how
        many tokens count in the loss) and `text`, special tokens included.
    """
    source = open_rows(prepare(config.train, config, field="train"))
    tokenizer = Tokenizer.load(config.tokenizer)
    for number in rows:
        row = source[number]
        for segment in range(1, int(row["segment_ids"].max()) + 1):
            where = row["segment_ids"] == segment
            yield {
                "row": number,
                "segment": segment,
                "tokens": int(where.sum()),
                "trained": int(row["mask"][where].sum()),
                "text": tokenizer.decode(row["tokens"][where].tolist(), skip_special=False),
            }


class _Made(Sequence[Batch]):
    """A sequence of batches that are made each time they are accessed."""

    def __init__(self, count: int, make: Callable[[int], Batch]) -> None:
        self._numbers, self._make = range(count), make

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._make(number) for number in self._numbers[index]]
        return self._make(self._numbers[index])


def validation_batches(
    config: DataConfig,
    batches: int,
    *,
    features: Features | None = None,
    shard_index: int = 0,
    shard_count: int = 1,
) -> Sequence[Batch]:
    """Returns the first `batches` batches of the validation text, the same at every call.

    A short text gives fewer batches. The last batch is filled up with rows of padding.

    Args:
        config: as for `train_iterator`.
        batches: the largest number of batches.
        features, shard_index, shard_count: as for `train_iterator`.

    Returns:
        Batches as `train_iterator` yields them; each is read when it is accessed.

    Raises:
        ValueError: no validation files, or a field of the configuration or of the text is wrong.
    """
    share = _share(config, shard_index, shard_count)
    source = rows(config, "validation", features=features)[1]
    size = config.batch_size

    def make(number: int) -> Batch:
        first = number * size + shard_index * share
        return batch_of(source, range(first, first + share))

    return _Made(min(batches, -(-len(source) // size)), make)


def rows(
    config: DataConfig, field: str = "train", *, features: Features | None = None
) -> tuple[str, Any]:
    """Returns a text's key (a hash of its content) and its prepared rows: `source[number]`.

    Args:
        config, features: as for `train_iterator`.
        field: "train" or "validation".

    Raises:
        ValueError: a field of the configuration or of the text is wrong.
    """
    folder = prepare(getattr(config, field), config, field=field)
    source = open_rows(folder)
    return folder.name, source if features is None else _Joined(source, features)


def batch_of(source: Any, numbers: Sequence[int]) -> Batch:
    """Returns rows of `source` as a batch; numbers past its end give rows of padding."""
    rows = [source[number] for number in numbers if number < len(source)]
    empty = {name: np.zeros_like(x) for name, x in (rows[0] if rows else source[0]).items()}
    rows += [empty] * (len(numbers) - len(rows))
    return _columns({name: np.stack([row[name] for row in rows]) for name in empty})


def _columns(batch: Batch) -> Batch:
    segments = batch["segment_ids"].astype(np.int32)
    starts = np.ones(segments.shape, bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    index = np.arange(segments.shape[1], dtype=np.int32)[None]
    first = np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    stored = {name: x for name, x in batch.items() if name not in ("tokens", "mask", "segment_ids")}
    return stored | {
        "tokens": batch["tokens"],
        "positions": np.where(segments > 0, index - first, 0),
        "segment_ids": segments,
        "loss_mask": batch["mask"].astype(np.float32),
    }


def _share(config: DataConfig, shard_index: int, shard_count: int) -> int:
    """Returns how many rows of a batch belong to one process."""
    if not 0 <= shard_index < shard_count:
        raise ValueError(f"shard_index={shard_index}: must lie in 0..{shard_count - 1}")
    if config.batch_size < 1 or config.batch_size % shard_count:
        raise ValueError(
            f"batch_size={config.batch_size}: must be a positive multiple of the "
            f"{shard_count} processes"
        )
    return config.batch_size // shard_count
