"""Prepares a text once: tokenizes its conversations, cuts and packs them, and stores the rows.

Rows are stored as ArrayRecord through tensorflow-datasets (TensorFlow itself is never imported).
The folder's name is a hash of text and settings, so a prepared folder that was copied to another
machine is found there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import io
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eagle_jax import fingerprint
from eagle_jax.checks import short
from eagle_jax.config import DataConfig
from eagle_jax.inputs import one_line
from eagle_jax.text import Tokenizer, encode_files
from eagle_jax.train.data.packing import Example, Row, cut, pack

# Increase when the content of prepared folders changes for the same input.
FORMAT = 1
SPLIT = "rows"
COUNTS = "token_counts.npy"


def prepare(files: Sequence[str], config: DataConfig, *, field: str = "train") -> Path:
    """Tokenizes and packs conversation files, unless they are already prepared.

    An interrupted preparation is never mistaken for a finished one.

    Args:
        files: conversations, JSONL or JSONL.gz.
        config: names the tokenizer, the sequence length and the cache folder.
        field: field of the configuration that names the files, for error messages.

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
        write_rows(rows, config.sequence_length, unfinished)
        unfinished.rename(folder)
    except (OSError, RuntimeError) as error:  # ArrayRecord raises RuntimeError on a full disk
        if not folder.is_dir():  # otherwise another process has stored the same content
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
    """Returns how often each token occurs in assistant turns of the training text.

    The counts are stored in the prepared folder, so a text is counted only once.

    Args:
        config: the text and the row length; the text is prepared first if necessary.

    Returns:
        Counts, int64 [largest token + 1].

    Raises:
        ValueError: a field of the configuration or of the text is wrong.
    """
    import tqdm

    folder = prepare(config.train, config, field="train")
    file = folder / COUNTS
    if file.is_file():
        with contextlib.suppress(ValueError, EOFError):  # a damaged file is counted again
            counts = np.load(file)
            if counts.ndim == 1 and counts.dtype == np.int64 and np.all(counts >= 0):
                return counts
    source, counts = open_rows(folder), np.zeros(0, np.int64)
    for first in tqdm.trange(0, len(source), 256, desc="counting", unit_scale=256, disable=None):
        rows = source.__getitems__(range(first, min(first + 256, len(source))))
        marked = np.concatenate([row["tokens"][row["mask"] > 0] for row in rows])
        new = np.bincount(marked, minlength=len(counts))
        new[: len(counts)] += counts
        counts = new
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".npy", delete=False) as unfinished:
        np.save(unfinished, counts)
    Path(unfinished.name).rename(file)  # atomic: readers never see a partial file
    return counts


def _read(files: Sequence[str], tokenizer: Tokenizer, length: int) -> Iterator[Example]:
    for tokens, mask in encode_files(files, tokenizer):
        yield from cut(tokens, mask, length)


def _key(files: Sequence[str], tokenizer: Tokenizer, length: int) -> str:
    settings = f"{FORMAT} {length} {tokenizer.digest}"
    contents = [bytes.fromhex(fingerprint.of_file(Path(file).expanduser())) for file in files]
    return fingerprint.of_texts(settings, *contents)


@functools.cache
def _builder_class() -> Any:
    """Returns the tfds builder class, made on first use because importing tfds takes a second."""
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


def write_rows(rows: Sequence[Row], length: int, folder: Path) -> None:
    """Writes rows into a folder as ArrayRecord files."""
    import tensorflow_datasets as tfds
    import tqdm

    with tqdm.tqdm(rows, desc="writing", unit=" rows", disable=None) as bar, _quiet(tfds):
        builder = _builder_class()(
            rows=bar, length=length, data_dir=folder, file_format="array_record"
        )
        builder.download_and_prepare()


def open_rows(folder: Path) -> Any:
    """Returns the rows of a prepared folder as a sequence.

    Raises:
        ValueError: the folder is damaged.
    """
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
    """Turns file errors of tfds, ArrayRecord and protocol buffers into ValueError."""
    try:
        yield
    except MemoryError:  # the files are not at fault
        raise
    except Exception as error:
        raise ValueError(
            f"cache_dir: {folder} is damaged ({short(error)}); delete it and it is prepared again"
        ) from error


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """The rows of a prepared folder, by number; it can be pickled for grain's workers."""

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
                if any(column is None for column in row.values()):  # the file was truncated
                    raise ValueError(f"row {number} is missing")
            return rows


@contextlib.contextmanager
def _quiet(tfds: Any) -> Iterator[None]:
    """Silences tfds, which otherwise prints every step and draws its own progress bars."""
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()


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
