"""Stores a target's features for draft training: `python -m eagle_jax.train.features`.

    python -m eagle_jax.train.features --config CONFIG --output DIR
    python -m eagle_jax.train --config CONFIG --set objective.features=DIR

By default the frozen target runs in every step of a draft's training. Stored features replace it:
a run that reads them loads only the target's embedding, final norm and head. A token takes
`(layers + 1) * width` numbers of two bytes (bfloat16) or one byte (int8): 8 kB or 4 kB for an
EAGLE-1 head of an 8B model, four times that for EAGLE-3. Features written for an EAGLE-3 head
serve the other heads as well.

CONFIG is the configuration of the draft's training. This command uses its training and validation
text, target, compute dtype and mesh (fsdp, tensor, expert), and runs the target on
`data.batch_size` rows at once. Several processes can share the work without communicating: give
each its share of the files with `--shard 0/4` ... `--shard 3/4`, on any machines that see DIR.

The command can be killed at any moment and started again: it skips finished files, and each process
repeats at most one file. Progress goes to stderr; the last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eagle_jax import cli, outputs, settings, sharding
from eagle_jax.checkpoint import files, hf
from eagle_jax.checkpoint.lazy_tensor import LazyTensor
from eagle_jax.config import NextToken, TrainConfig, TransformerConfig
from eagle_jax.train import data, objectives, offline
from eagle_jax.train.objectives import target
from eagle_jax.train.trainer import check_attention, check_tokens

# Maps a batch of rows to the `target.compress` of their features, on the devices.
Compute = Callable[[data.Batch], dict[str, jax.Array]]
ROWS_PER_FILE = 64


def write(
    config: TrainConfig,
    output: str | Path,
    *,
    shard: int = 0,
    shards: int = 1,
    dtype: str = "bfloat16",
    rows_per_file: int = ROWS_PER_FILE,
) -> dict[str, Any]:
    """Writes the feature files of one shard that do not exist yet.

    Args:
        config: configuration of a draft's training.
        output: the directory to write; later runs name it in `objective.features`.
        shard, shards: files `shard`, `shard + shards`, ... are written.
        dtype: "bfloat16" or "int8".
        rows_per_file: prepared rows in one file, the most that a killed process has to repeat.

    Returns:
        For each text ("train", "validation"): files, rows, tokens and bytes written, files skipped,
        files_of_all_shards, and bytes_per_token. In addition: seconds.

    Raises:
        ValueError: the configuration cannot be trained, `output` holds features of another
            configuration, or the disk is full.
    """
    if isinstance(config.objective, NextToken):
        raise ValueError(
            "objective: NextToken reads no features of a target; give the config of a draft"
        )
    if dtype not in offline.DTYPES:
        raise ValueError(f"dtype={dtype!r}: must be one of {', '.join(offline.DTYPES)}")
    if not 0 <= shard < shards:
        raise ValueError(f"shard={shard}/{shards}: must be 0/{shards} to {shards - 1}/{shards}")
    if rows_per_file < 1:
        raise ValueError(f"rows_per_file={rows_per_file}: must be at least 1")
    began = time.perf_counter()
    model = hf.open_target(objectives.target_directory(config.objective.target))
    # Raises now whatever error training with this configuration would raise.
    objectives.assemble(config, *model, lambda *_: (np.zeros(0, np.int32), None))
    compute, size = None, 0
    result: dict[str, Any] = {}
    for field in ("train", "validation") if config.data.validation else ("train",):
        made, rows = offline.manifest(config, field, dtype=dtype, rows_per_file=rows_per_file)
        folder = Path(output).expanduser() / field
        _claim(folder, made)
        every = offline.paths(folder, made)
        mine = [(i, path) for i, path in enumerate(every) if i % shards == shard]
        todo = [(i * rows_per_file, path) for i, path in mine if not path.exists()]
        if todo and compute is None:
            compute, size = _compiled(config, *model, dtype, rows_per_file)
        counts = collections.Counter(files=len(todo), skipped=len(mine) - len(todo))
        bar = _bar(field, sum(min(rows_per_file, len(rows) - first) for first, _ in todo))
        with bar:
            for first, path in todo:
                numbers = range(first, min(first + rows_per_file, len(rows)))
                assert compute is not None
                counts.update(_write_file(path, rows, numbers, compute, size, bar.update))
        result[field] = {
            **{name: counts[name] for name in ("files", "skipped", "rows", "tokens", "bytes")},
            "files_of_all_shards": len(every),
            "bytes_per_token": counts["bytes"] / counts["tokens"] if counts["tokens"] else None,
        }
    return result | {"seconds": round(time.perf_counter() - began, 3)}


def _claim(folder: Path, made: offline.Manifest) -> None:
    """Makes the folder and its manifest, or checks that the manifest found there is `made`."""
    path = folder / offline.MANIFEST
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        files.write_json(path, made)
        return
    for name, theirs, ours in offline.differences(offline.read_manifest(path), made):
        raise ValueError(
            f"{path}: has {name}={theirs!r}, this command would write {ours!r}; give another "
            "--output, or delete this one"
        )


def _compiled(
    config: TrainConfig,
    target_config: TransformerConfig,
    weights: Mapping[str, LazyTensor],
    dtype: str,
    rows_per_file: int,
) -> tuple[Compute, int]:
    """Returns a function from batches to compressed features, and its number of rows."""
    assert not isinstance(config.objective, NextToken)
    layers = target.layers(config.objective)
    mesh = sharding.make_mesh(config.fsdp, tensor=config.tensor, expert=config.expert)
    check_attention(config, mesh)
    groups = sharding.mesh_parts(mesh, "batch")
    size = max(1, min(config.data.batch_size, rows_per_file) // groups) * groups
    places, rows = sharding.weight_shardings(mesh, weights), sharding.batch_sharding(mesh)
    own = jnp.dtype(config.compute_dtype)
    frozen = {
        name: jax.device_put(np.asarray(x).astype(own), places[name]) for name, x in weights.items()
    }

    def features(frozen: Any, batch: Any) -> Any:
        with sharding.using(mesh):
            used = sharding.weight_shardings(mesh, frozen, stored=False)
            frozen = jax.lax.with_sharding_constraint(frozen, used)
            streams = target.features(target_config, layers, frozen, batch, config.attention)
            return target.compress(streams, dtype)

    compiled = jax.jit(features, in_shardings=(places, rows), out_shardings=rows)

    def compute(batch: data.Batch) -> dict[str, jax.Array]:
        check_tokens(config, target_config.vocab_size, batch)
        names = ("tokens", "positions", "segment_ids")
        return compiled(frozen, {name: jax.device_put(batch[name], rows) for name in names})

    return compute, size


def _write_file(
    path: Path,
    source: Any,
    numbers: range,
    compute: Compute,
    size: int,
    progress: Callable[[int], Any],
) -> dict[str, int]:
    """Writes one file atomically; returns its counts of rows, tokens and bytes."""
    counts = collections.Counter(rows=len(numbers))

    def batches() -> Iterator[tuple[list[int], dict[str, jax.Array]]]:
        for first in range(numbers.start, numbers.stop, size):
            # Rows after the file's last one become padding, even if the text has more rows.
            own = [i if i < numbers.stop else len(source) for i in range(first, first + size)]
            batch = data.batch_of(source, own)
            tokens = np.count_nonzero(batch["segment_ids"], axis=1)[: numbers.stop - first]
            yield tokens.tolist(), compute(batch)

    with outputs.locked("output", path), _replacing(path) as add:
        for tokens, arrays in _one_behind(batches()):
            host = jax.device_get(arrays)
            for row, count in enumerate(tokens):
                record = offline.record(host, row, count)
                add(record)
                counts.update(tokens=count, bytes=len(record))
            progress(len(tokens))
    return counts


def _one_behind(items: Iterable[Any]) -> Iterator[Any]:
    """Yields each item after the next one has started, so that devices and disk overlap."""
    waiting: collections.deque[Any] = collections.deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > 1:
            yield waiting.popleft()
    yield from waiting


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Callable[[bytes], None]]:
    """Yields a function that adds records to a file; the file gets its name when complete."""
    from array_record.python.array_record_module import ArrayRecordWriter

    # The name is fixed for each file, so the next process overwrites what a killed one left.
    unfinished = path.with_name(f".{path.name}.unfinished")
    writer = ArrayRecordWriter(str(unfinished), "group_size:1,uncompressed")

    def told(act: Callable[..., Any], *arguments: Any) -> None:
        try:
            act(*arguments)
        except RuntimeError as error:
            raise ValueError(
                f"{path}: cannot be written ({error}); the files before it are complete: make "
                "space and start the same command again"
            ) from error

    try:
        yield lambda record: told(writer.write, record)
        told(writer.close)
        _sync(unfinished)
        unfinished.replace(path)
        _sync(path.parent)
    except BaseException:
        with contextlib.suppress(RuntimeError):
            writer.close()
        unfinished.unlink(missing_ok=True)
        raise


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _bar(field: str, rows: int) -> Any:
    from tqdm import tqdm

    pace = 0.5 if sys.stderr.isatty() else 15.0
    return tqdm(total=rows, desc=field, unit=" rows", mininterval=pace, disable=not rows)


def _shard(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal()):
        raise ValueError(f"--shard={text}: write i/n, e.g. 0/4 for the first of four")
    return int(index), int(count)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m eagle_jax.train.features",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    settings.add_arguments(parser, "a draft's TrainConfig file")
    parser.add_argument("--output", required=True, metavar="DIR", help="receives the features")
    parser.add_argument(
        "--shard", default="0/1", metavar="I/N", help="this process's share, from 0 (default 0/1)"
    )
    parser.add_argument(
        "--dtype", choices=tuple(offline.DTYPES), default="bfloat16", help="what is stored"
    )
    parser.add_argument(
        "--rows-per-file",
        type=int,
        default=ROWS_PER_FILE,
        metavar="N",
        help=f"sequences of one file, the most that a kill costs (default {ROWS_PER_FILE})",
    )
    return parser.parse_args()


def main() -> None:
    """Parses the command line, writes the features, and prints the result as one JSON line."""
    arguments = _arguments()
    shard, shards = _shard(arguments.shard)
    config = settings.load(arguments.config, arguments.overrides, kind=TrainConfig)
    result = write(
        config,
        arguments.output,
        shard=shard,
        shards=shards,
        dtype=arguments.dtype,
        rows_per_file=arguments.rows_per_file,
    )
    print(json.dumps({"output": arguments.output, "dtype": arguments.dtype, **result}), flush=True)


if __name__ == "__main__":
    cli.run(main)
