"""What is converted: which directories hold the target and the drafts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from eagle_jax.checkpoint import hf


@dataclasses.dataclass(frozen=True)
class Source:
    """What is converted: directories of a target and of drafts.

    Attributes:
        target: of the target, if there is one.
        drafts: of the drafts.
        root: of a directory that holds both, with its manifest.
    """

    target: Path | None
    drafts: tuple[Path, ...]
    root: Path | None = None


def find_source(
    path: str | Path, target: str | Path | None, drafts: Sequence[str | Path]
) -> Source:
    """Returns what lies at `path`, with a target and further drafts that come from elsewhere.

    Raises:
        ValueError: `path` has a target of its own, or `target` is none.
    """
    from eagle_jax.params import find, own_drafts  # imports jax

    root = find(path)
    more = [Path(directory).expanduser() for directory in drafts]
    outer = target_of(target)
    if (root / "target").is_dir():
        if outer is not None:
            raise ValueError(f"target: {root} has a target of its own; leave --target out")
        return Source(root / "target", (*own_drafts(root), *more), root)
    if hf.is_whole(root):
        if outer is not None:  # a small model that drafts for a large one
            return Source(outer, (root, *more))
        return Source(root, tuple(more))
    return Source(outer, (root, *more))


def target_of(path: str | Path | None) -> Path | None:
    """Returns the directory of a target that a user names, or None without a name."""
    from eagle_jax.params import find

    if path is None:
        return None
    root = find(path)
    root = root / "target" if (root / "target").is_dir() else root
    if not hf.is_whole(root):
        raise ValueError(f"target: {root} is a draft of kind {hf.kind(root)!r}; give its target")
    return root


def choose_draft(source: Source, kind: str | None) -> Path:
    """Returns the directory of the one draft of this kind, or of the only draft.

    Raises:
        ValueError: there is none, or more than one.
    """
    kinds = {directory: hf.kind(directory) for directory in source.drafts}
    chosen = [directory for directory in kinds if kind in (None, kinds[directory])]
    if len(chosen) == 1:
        return chosen[0]
    if not kinds:
        raise ValueError(f"{source.target}: is a target without drafts; give the draft with --from")
    have = ", ".join(sorted(set(kinds.values()))) or "none"
    if kind is None:
        raise ValueError(f"kind: the source has several drafts ({have}); choose one with --kind")
    raise ValueError(
        f"kind={kind!r}: the source has {len(chosen)} such drafts (all: {have}); give one directory"
    )
