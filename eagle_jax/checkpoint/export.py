"""Drafts in the layouts of those who run them: the official code, SGLang, speculators and vLLM.

Each drafter says which layouts it has, and what they are (`eagle_jax.drafters.files.DraftFiles`):

| layout | EAGLE-1 | EAGLE-3 | Medusa |
|---|---|---|---|
| official | yes | yes | yes |
| sglang | `LlamaForCausalLMEagle` | `LlamaForCausalLMEagle3` | |
| speculators | | `Eagle3Speculator`, as vLLM reads it | |

None of them has a draft vocabulary for EAGLE-1 (SGLang takes one from a file of its own,
`--speculative-token-map`). There the head is written without it: the same weights, which then
draft from all tokens and cost more. `NATIVE` keeps it.

A wrong word in such a file lowers acceptance and nothing else tells. So whatever follows from a
default elsewhere is written out, and what was written is read again and compared, bit by bit,
before it counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from eagle_jax.checkpoint import files, hf, safetensors, torch_bin
from eagle_jax.checkpoint.lazy_tensor import LazyTensor, cast, lazily
from eagle_jax.config import DraftConfig
from eagle_jax.drafters import draft_vocabulary, registry
from eagle_jax.drafters.files import EMBEDDING, NATIVE, ExportTarget

LAYOUTS = ("official", "sglang", "speculators")


@runtime_checkable
class Bar(Protocol):
    """A progress bar; tqdm's are."""

    def update(self, count: int, /) -> object: ...


class NoBar:
    """A progress bar that shows nothing."""

    def __enter__(self) -> NoBar:
        return self

    def __exit__(self, *unused: object) -> None:
        pass

    def update(self, count: int) -> None:
        pass


def write(
    directory: Path,
    config: DraftConfig,
    params: Mapping[str, Any],
    layout: str,
    dtype: str | None,
    *,
    target: ExportTarget | None = None,
    extra: Mapping[str, Any] | None = None,
    embedding: LazyTensor | None = None,
    bar: Callable[[int], AbstractContextManager[Bar]] = lambda total: NoBar(),
) -> DraftConfig:
    """Writes a draft, reads it again and compares; returns it as the layout says it.

    Args:
        directory: must exist; what fails leaves files there, so give one of `files.staged`.
        config: of the draft.
        params: its arrays by their Flax names, as `hf.open_draft` gives them.
        layout: one of `LAYOUTS`, or `NATIVE`.
        dtype: of the weights on disk; None: one that holds all of them as they are.
        target: what the draft was trained for.
        extra: further keys of `config.json`, which give way to those that the layout has.
        embedding: the target's matrix [v, d], to write beside the weights of a draft that has
            none, for the layouts that have one.
        bar: makes a progress bar, given the number of bytes that are written and compared.

    Raises:
        ValueError: `params` don't match `config`, the layout cannot say what this draft computes,
            or what was written reads as something else.
        OSError: the directory cannot be written.
    """
    exact = dtype is None
    dtype = dtype or _exact_dtype(params)
    files.check_params(config, params, dtype)
    _check_layout(config, layout)
    own = registry.by_config(config).checkpoint()
    config, params = own.as_layout(config, params, layout)
    settings = {**(extra or {}), **own.export_settings(config, layout, dtype, target)}
    if draft_vocabulary.size_of(config) is None:
        settings.pop(draft_vocabulary.COVERAGE, None)  # of one that the layout has not
    tensors = own.export_tensors(config, params, layout, dtype)
    beside: dict[str, LazyTensor] = {}
    if embedding is not None and own.embedding(config, layout) != "none":
        beside[EMBEDDING] = embedding if exact else cast(EMBEDDING, embedding, dtype)
    tensors |= beside
    expected = {name: lazily(array) for name, array in params.items()}
    if not exact:
        expected = {name: _cast(array, dtype) for name, array in expected.items()}
    paths = [directory / name for name in own.export_files(layout)]
    total = 2 * len(paths) * size(tensors)  # written, and read again
    with bar(total + size(expected)) as progress:
        for path in paths:
            if path.suffix == ".bin":
                torch_bin.write(path, tensors, progress.update)
            else:
                safetensors.write(path, tensors, {"format": "pt"}, progress.update)
        files.write_json(directory / "config.json", settings)
        found, again = hf.open_draft(directory, target.config if target else None)
        if found != config:
            raise ValueError(f"{directory}: reads as {found}, not as {config}; please report this")
        if exact:  # the source's numbers come back, whatever dtype they took on the way
            again = {
                n: x.astype(expected[n].dtype if n in expected else x.dtype)
                for n, x in again.items()
            }
        compare(directory, again, expected, progress)
        for path in paths:
            read = torch_bin.stored if path.suffix == ".bin" else safetensors.stored
            compare(directory, read(path), tensors, progress)
    return config


def compare(
    directory: Path,
    found: Mapping[str, LazyTensor],
    expected: Mapping[str, LazyTensor],
    progress: Bar,
) -> None:
    """Raises ValueError unless both have the same names, dtypes and bits; one tensor at a time."""
    if found.keys() != expected.keys():
        names = sorted(found.keys() ^ expected.keys())
        raise ValueError(f"{directory}: {names[0]} got lost or was added; please report this")
    for name, array in expected.items():
        old, new = np.asarray(array), np.asarray(found[name])
        if old.dtype != new.dtype or old.shape != new.shape or not _same(old, new):
            raise ValueError(f"{directory}: {name} reads otherwise than written; try another disk")
        progress.update(new.nbytes)


def size(arrays: Mapping[str, Any]) -> int:
    """Bytes that these arrays take."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays.values())


def _same(one: np.ndarray, two: np.ndarray) -> bool:
    one, two = (np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (one, two))
    return np.array_equal(one, two)


def _exact_dtype(params: Mapping[str, Any]) -> str:
    """The dtype that holds all weights as they are."""
    names = {x.dtype.name for x in params.values() if x.dtype.kind not in "iub"}
    if not names <= set(files.DTYPES):
        raise ValueError(
            f"weights are {', '.join(sorted(names))}; give --dtype, one of "
            f"{', '.join(files.DTYPES)}"
        )
    return names.pop() if len(names) == 1 else "float32"  # neither of bfloat16 and float16 does


def _cast(array: Any, dtype: str) -> LazyTensor:
    array = lazily(array)
    return array if array.dtype.kind in "iub" else array.astype(dtype)


def _check_layout(config: DraftConfig, layout: str) -> None:
    """Raises ValueError unless this kind of draft can be written in a layout."""
    if layout not in (*LAYOUTS, NATIVE):
        raise ValueError(f"layout={layout!r}: must be one of {', '.join(LAYOUTS)}")
    known = {kind: spec.checkpoint() for kind, spec in registry.specs().items()}
    own = known[config.kind]
    if layout == NATIVE or own.whole or layout in own.layouts:  # `as_layout` refuses whole models
        return
    kinds = [kind for kind, other in known.items() if layout in other.layouts]
    raise ValueError(
        f"draft: kind {config.kind!r} has no layout in {layout}, which knows "
        f"{', '.join(kinds)}; use 'official'"
    )
