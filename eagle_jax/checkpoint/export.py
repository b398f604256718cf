"""Writes drafts for other programs: the official code, SGLang, speculators and vLLM.

Each drafter defines the layouts that it supports (`eagle_jax.drafters.files.DraftFiles`):

| layout | EAGLE-1 | EAGLE-3 | Medusa |
|---|---|---|---|
| official | yes | yes | yes |
| sglang | `LlamaForCausalLMEagle` | `LlamaForCausalLMEagle3` | |
| speculators | | `Eagle3Speculator`, as vLLM reads it | |

None of these layouts can store a draft vocabulary for EAGLE-1 (SGLang takes one from a separate
file, `--speculative-token-map`). The head is then written without it: with the same weights it
drafts from all tokens, which costs more time. `NATIVE` keeps the draft vocabulary.

A wrong setting in such a file lowers acceptance without any error. Therefore settings are written
even where they equal a reader's default, and the files are read back and compared bit by bit before
the conversion counts as done.
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
    """The protocol of a progress bar, such as tqdm's."""

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
    """Writes a draft, reads it back and compares; returns its configuration in that layout.

    Args:
        directory: an existing directory; a failure leaves files there, so give one of
            `files.staged`.
        config: the draft's configuration.
        params: the draft's arrays by Flax name, as `hf.open_draft` returns them.
        layout: one of `LAYOUTS`, or `NATIVE`.
        dtype: dtype of the weights on disk; None: the dtype that stores all of them exactly.
        target: the target that the draft was trained for.
        extra: further keys of `config.json`; the layout's own keys take precedence.
        embedding: the target's embedding [v, d], for a draft without one and a layout that stores
            one.
        bar: makes a progress bar from the number of bytes that are written and compared.

    Raises:
        ValueError: `params` don't match `config`, the layout cannot express what this draft
            computes, or the files read back differ from what was written.
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
        settings.pop(draft_vocabulary.COVERAGE, None)  # the layout has no draft vocabulary
    tensors = own.export_tensors(config, params, layout, dtype)
    beside: dict[str, LazyTensor] = {}
    if embedding is not None and own.embedding(config, layout) != "none":
        beside[EMBEDDING] = embedding if exact else cast(EMBEDDING, embedding, dtype)
    tensors |= beside
    expected = {name: lazily(array) for name, array in params.items()}
    if not exact:
        expected = {name: _cast(array, dtype) for name, array in expected.items()}
    paths = [directory / name for name in own.export_files(layout)]
    total = 2 * len(paths) * size(tensors)  # written once and read back once
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
        if exact:  # the dtype on disk stores the source's numbers exactly, so they must come back
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
    """Raises ValueError unless both have the same names, dtypes and bits; reads tensors singly."""
    if found.keys() != expected.keys():
        names = sorted(found.keys() ^ expected.keys())
        raise ValueError(f"{directory}: {names[0]} got lost or was added; please report this")
    for name, array in expected.items():
        old, new = np.asarray(array), np.asarray(found[name])
        if old.dtype != new.dtype or old.shape != new.shape or not _same(old, new):
            raise ValueError(f"{directory}: {name} reads otherwise than written; try another disk")
        progress.update(new.nbytes)


def size(arrays: Mapping[str, Any]) -> int:
    """Returns the number of bytes of these arrays."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays.values())


def _same(one: np.ndarray, two: np.ndarray) -> bool:
    one, two = (np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (one, two))
    return np.array_equal(one, two)


def _exact_dtype(params: Mapping[str, Any]) -> str:
    """Returns the dtype that stores all weights exactly."""
    names = {x.dtype.name for x in params.values() if x.dtype.kind not in "iub"}
    if not names <= set(files.DTYPES):
        raise ValueError(
            f"weights are {', '.join(sorted(names))}; give --dtype, one of "
            f"{', '.join(files.DTYPES)}"
        )
    return names.pop() if len(names) == 1 else "float32"  # it holds both of the others


def _cast(array: Any, dtype: str) -> LazyTensor:
    array = lazily(array)
    return array if array.dtype.kind in "iub" else array.astype(dtype)


def _check_layout(config: DraftConfig, layout: str) -> None:
    """Raises ValueError unless this kind of draft can be written in the layout."""
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
