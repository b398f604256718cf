"""Conversations -> packed sequences -> batches.

Preparation, once per text: conversations are tokenized, cut to `sequence_length`, packed into rows
of exactly that many tokens and stored as ArrayRecord through tensorflow-datasets (TensorFlow itself
is never imported). The folder's name is a hash of what went in, so a prepared folder can be copied
to another machine and is found there.

Training reads rows at random through grain, whose iterator state is a checkpointable dictionary.
Packing is fixed and only rows are shuffled: segments do not see each other, so which of them share
a row makes no difference to any token's loss.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from eagle_jax.checks import short
from eagle_jax.config import DataConfig
from eagle_jax.inputs import one_line
from eagle_jax.text import Tokenizer, encode_files

# Raise when the content of prepared folders changes for the same input.
FORMAT = 1
SPLIT = "rows"
COUNTS = "token_counts.npy"
Batch = dict[str, np.ndarray]
Row = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Example:
    """A conversation, or a part of one that is longer than a sequence.

    Attributes:
        tokens: [n] int32.
        mask: [n] uint8, 1 on tokens of assistant turns.
    """

    tokens: np.ndarray
    mask: np.ndarray


@runtime_checkable
class Features(Protocol):
    """Arrays that belong to the tokens of prepared rows; see `eagle_jax.train.offline`."""

    def read(self, number: int, tokens: int) -> Row:
        """Arrays [sequence_length, ...] of a row, zero past its `tokens` tokens."""
        ...


@dataclasses.dataclass(frozen=True)
class _Joined:
    """Rows with what is stored for them elsewhere, by number."""

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
    """Endless shuffled batches; every epoch has a new order.

    Args:
        config: the text and its shape; prepared first if this was not done before.
        features: read beside the rows; the order is the same with and without.
        shard_index, shard_count: this process and the number of processes that share a batch.

    Returns:
        A grain iterator (`next`, `get_state`, `set_state`, `close`) of batches with `b` rows,
        this process's `batch_size / shard_count`, and `t = sequence_length`. States are JSON and
        fit iterators of the same batch size and number of workers. Close it when it has workers.

        - `tokens` int32 [b, t], 0 in padding;
        - `positions` int32 [b, t], from 0 in every segment;
        - `segment_ids` int32 [b, t], from 1 in every row, 0 in padding;
        - `loss_mask` float32 [b, t], 1 on tokens of assistant turns;
        - and those of `features`, [b, t, ...].

    Raises:
        ValueError: a field of the configuration or of the text is wrong.
    """
    import grain
    from absl import flags

    source = rows(config, features=features)[1]
    dataset = _batches(source, config, shard_index, shard_count).map(_columns)
    # Elements are whole batches: a few are enough, grain's default would hold 500.
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
    """Elements of `source` in the order of training: batch `n` is that of step `n + 1`."""
    import grain

    share = _share(config, shard_index, shard_count)
    # Cut into shares only at the end: the rows of a step, and their order, are the same however
    # many processes share them.
    return (
        grain.MapDataset.source(source)
        .shuffle(seed=config.seed)
        .repeat()
        .batch(share, drop_remainder=True)
        .slice(slice(shard_index, None, shard_count))
    )


def step_rows(config: DataConfig, step: int) -> list[int]:
    """Numbers of the prepared rows that step `step` (from 1) is trained on.

    Args:
        config: as for `train_iterator`.
        step: of the run.

    Raises:
        ValueError: `step` is below 1, or a field of the configuration or of the text is wrong.
    """
    if step < 1:
        raise ValueError(f"step={step}: must be at least 1")
    numbers = range(len(_open(prepare(config.train, config, field="train"))))
    return [int(row) for row in _batches(numbers, config, 0, 1)[step - 1]]


def texts(config: DataConfig, rows: Iterable[int]) -> Iterator[dict[str, Any]]:
    """Prepared rows, to be read by people: a dictionary for each conversation in them.

    Args:
        config: as for `train_iterator`.
        rows: numbers, as `step_rows` gives them.

    Yields:
        `row`, `segment` (from 1, in the row), `tokens` (how many), `trained` (how many of them
        count in the loss) and `text`, special tokens included.
    """
    source = _open(prepare(config.train, config, field="train"))
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
    """Batches that are made whenever they are asked for."""

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
    """The first `batches` batches of the validation text, the same at every call.

    Fewer if the text is shorter; the last one is filled up with rows of padding.

    Args:
        config: as for `train_iterator`.
        batches: how many at most.
        features, shard_index, shard_count: as for `train_iterator`.

    Returns:
        Batches as `train_iterator` yields them, read when they are asked for.

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
    """A text's key, the same for the same content, and its prepared rows: `source[number]`.

    Args:
        config, features: as for `train_iterator`.
        field: "train" or "validation".

    Raises:
        ValueError: a field of the configuration or of the text is wrong.
    """
    folder = prepare(getattr(config, field), config, field=field)
    source = _open(folder)
    return folder.name, source if features is None else _Joined(source, features)


def batch_of(source: Any, numbers: Sequence[int]) -> Batch:
    """Rows of `source` as a batch; numbers past its end give rows of padding."""
    rows = [source[number] for number in numbers if number < len(source)]
    empty = {name: np.zeros_like(x) for name, x in (rows[0] if rows else source[0]).items()}
    rows += [empty] * (len(numbers) - len(rows))
    return _columns({name: np.stack([row[name] for row in rows]) for name in empty})


def prepare(files: Sequence[str], config: DataConfig, *, field: str = "train") -> Path:
    """Tokenizes and packs conversation files, unless this was done before.

    A preparation that is interrupted leaves nothing that would be taken for a finished one.

    Args:
        files: conversations, JSONL or JSONL.gz.
        config: names the tokenizer, the sequence length and the cache folder.
        field: of the configuration that names the files, for error messages.

    Returns:
        The prepared folder, `cache_dir/<hash>`.

    Raises:
        ValueError: a file or field is wrong, or there is no conversation.
    """
    _check(files, config, field)
    tokenizer = Tokenizer.load(config.tokenizer)
    folder = Path(config.cache_dir).expanduser() / _key(files, tokenizer, config.sequence_length)
    if folder.is_dir():
        return folder
    rows = list(pack(_read(files, tokenizer, config.sequence_length), config.sequence_length))
    if not rows:
        raise ValueError(f"{field}={tuple(files)}: no conversations in these files")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}.unfinished-", dir=folder.parent))
    try:
        _write(rows, config.sequence_length, unfinished)
        unfinished.rename(folder)
    except (OSError, RuntimeError) as error:  # ArrayRecord raises the second on a full disk
        if not folder.is_dir():  # else another process was first, with the same content
            full = any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT))
            said = "disk full" if full else one_line(error)
            raise ValueError(
                f"data.cache_dir={config.cache_dir!r}: the prepared text cannot be written there "
                f"({said}); make room, or give another directory"
            ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def token_counts(config: DataConfig) -> np.ndarray:
    """How often each token occurs in assistant turns of the training text.

    Counted once: the result is stored in the prepared folder, whose name is a hash of the content.

    Args:
        config: the text and its shape; prepared first if this was not done before.

    Returns:
        int64 [largest token + 1].

    Raises:
        ValueError: a field of the configuration or of the text is wrong.
    """
    import tqdm

    folder = prepare(config.train, config, field="train")
    file = folder / COUNTS
    if file.is_file():
        with contextlib.suppress(ValueError, EOFError):  # damaged: counted again
            counts = np.load(file)
            if counts.ndim == 1 and counts.dtype == np.int64 and np.all(counts >= 0):
                return counts
    source, counts = _open(folder), np.zeros(0, np.int64)
    for first in tqdm.trange(0, len(source), 256, desc="counting", unit_scale=256, disable=None):
        rows = source.__getitems__(range(first, min(first + 256, len(source))))
        marked = np.concatenate([row["tokens"][row["mask"] > 0] for row in rows])
        new = np.bincount(marked, minlength=len(counts))
        new[: len(counts)] += counts
        counts = new
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".npy", delete=False) as unfinished:
        np.save(unfinished, counts)
    Path(unfinished.name).rename(file)  # whoever reads it finds the whole
    return counts


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
        examples: of at most `length` tokens each; their order does not survive.
        length: tokens `t` of a row.

    Yields:
        `tokens` int32 [t], `mask` uint8 [t] and `segment_ids` uint16 [t], 0 in padding.
    """
    examples = list(examples)
    # Files come sorted by source; mixed first, rows and thus batches hold all kinds of text.
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
    """Indices of the items in each bin: every item goes where the least space is left over."""
    bins: list[list[int]] = []
    open_bins: list[list[int]] = [[] for _ in range(capacity + 1)]  # bins by free space
    occupied = 0  # bit s is set while a bin with s free exists: the best fit is one bit scan
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


def _empty_row(length: int) -> Row:
    return {
        "tokens": np.zeros(length, np.int32),
        "mask": np.zeros(length, np.uint8),
        "segment_ids": np.zeros(length, np.uint16),
    }


def _read(files: Sequence[str], tokenizer: Tokenizer, length: int) -> Iterator[Example]:
    for tokens, mask in encode_files(files, tokenizer):
        yield from cut(tokens, mask, length)


def _key(files: Sequence[str], tokenizer: Tokenizer, length: int) -> str:
    digest = hashlib.sha256(f"{FORMAT} {length} {tokenizer.digest}".encode())
    for file in files:
        with Path(file).expanduser().open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:32]


@functools.cache
def _builder_class() -> Any:
    """The tfds builder; made on first use, because importing tfds takes a second."""
    import tensorflow_datasets as tfds

    class Conversations(tfds.core.GeneratorBasedBuilder):
        """Packed rows of conversations."""

        VERSION = tfds.core.Version(f"{FORMAT}.0.0")
        # Only needed for checksums of downloads; finding it imports importlib_resources, which
        # tfds does not declare.
        code_path = None

        def __init__(self, rows: Iterable[Row], length: int, **kwargs: Any):
            self._rows = rows
            self._length = length
            super().__init__(**kwargs)

        def _info(self) -> Any:
            shape = (self._length,)
            features = {
                "tokens": tfds.features.Tensor(shape=shape, dtype=np.int32),
                "mask": tfds.features.Tensor(shape=shape, dtype=np.uint8),
                "segment_ids": tfds.features.Tensor(shape=shape, dtype=np.uint16),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager: Any) -> Any:
            del dl_manager
            return {SPLIT: self._generate_examples()}

        def _generate_examples(self) -> Any:
            return enumerate(self._rows)

    return Conversations


def _write(rows: Sequence[Row], length: int, folder: Path) -> None:
    import tensorflow_datasets as tfds
    import tqdm

    with tqdm.tqdm(rows, desc="writing", unit=" rows", disable=None) as bar, _quiet(tfds):
        builder = _builder_class()(
            rows=bar, length=length, data_dir=folder, file_format="array_record"
        )
        builder.download_and_prepare()


def _open(folder: Path) -> Any:
    import tensorflow_datasets as tfds

    infos = list(folder.glob("*/*/dataset_info.json"))
    if len(infos) != 1:
        raise ValueError(f"cache_dir: {folder} is damaged; delete it and it is prepared again")
    with _telling_damage(folder):
        builder: Any = tfds.builder_from_directory(infos[0].parent)
        source = builder.as_data_source(SPLIT)
        return _Prepared(folder, source, len(source))


@contextlib.contextmanager
def _telling_damage(folder: Path) -> Iterator[None]:
    """Whatever tfds, ArrayRecord and protocol buffers raise about damaged files, as ValueError."""
    try:
        yield
    except MemoryError:  # says nothing about the files
        raise
    except Exception as error:
        raise ValueError(
            f"cache_dir: {folder} is damaged ({short(error)}); delete it and it is prepared again"
        ) from error


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """The rows of a prepared folder, by number; grain's workers read them too, so it pickles."""

    folder: Path
    source: Any
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: Any) -> Row:
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: Sequence[int]) -> Sequence[Row]:
        with _telling_damage(self.folder):
            rows = self.source.__getitems__(numbers)
            for row, number in zip(rows, numbers, strict=True):
                if any(column is None for column in row.values()):  # of a file that was cut short
                    raise ValueError(f"row {number} is missing")
            return rows


@contextlib.contextmanager
def _quiet(tfds: Any) -> Iterator[None]:
    """tfds announces every step on standard output and draws bars of its own."""
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()


def _share(config: DataConfig, shard_index: int, shard_count: int) -> int:
    """Rows of a batch that belong to one process."""
    if not 0 <= shard_index < shard_count:
        raise ValueError(f"shard_index={shard_index}: must lie in 0..{shard_count - 1}")
    if config.batch_size < 1 or config.batch_size % shard_count:
        raise ValueError(
            f"batch_size={config.batch_size}: must be a positive multiple of the "
            f"{shard_count} processes"
        )
    return config.batch_size // shard_count


def _check(files: Sequence[str], config: DataConfig, field: str) -> None:
    if not files:
        raise ValueError(f"{field}=(): name at least one file of conversations")
    if isinstance(files, str):
        raise ValueError(f"{field}={files!r}: must be a tuple of files, ({files!r},)")
    for file in files:
        if not Path(file).expanduser().is_file():
            raise ValueError(f"{field}={file!r}: no such file; give a .jsonl or .jsonl.gz")
    if not config.tokenizer:
        raise ValueError("tokenizer='': name a tokenizer.json or a directory that holds one")
    if config.sequence_length < 2:
        raise ValueError(f"sequence_length={config.sequence_length}: must be at least 2")
    if config.workers < 0:
        raise ValueError(f"workers={config.workers}: must be 0 or more")
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"seed={config.seed}: must lie in 0..2**32-1")
