"""The manifest of a model directory, which holds `target/` and one directory per draft.

`eagle_jax.json` lists the kind of each directory and the size and SHA-256 of every file, which
reveals a file that was truncated, replaced or edited. A directory without a manifest can be loaded
too; then only the files themselves are checked.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from eagle_jax import fingerprint
from eagle_jax.checkpoint import files

MANIFEST = "eagle_jax.json"
VERSION = 1

# Checksums of larger files would take longer than loading; sizes are always compared.
_QUICK = 64 * 2**20


def write_manifest(root: Path, parts: Mapping[str, str]) -> None:
    """Writes the manifest of a directory whose other files are complete.

    Args:
        root: directory of the model.
        parts: kind of each of its directories: "target", or the kind of a draft.
    """
    content = {
        "format": "eagle_jax",
        "version": VERSION,
        "parts": {
            name: {
                "kind": kind,
                "files": {
                    path.name: {"size": path.stat().st_size, "sha256": fingerprint.of_file(path)}
                    for path in sorted((root / name).iterdir())
                },
            }
            for name, kind in parts.items()
        },
    }
    files.write_json(root / MANIFEST, content)


def parts(root: Path) -> dict[str, str] | None:
    """Returns the kind of each directory in the manifest, or None if there is no manifest.

    Raises:
        ValueError: the file is not a manifest, or another version wrote it.
    """
    content = _read(root)
    return None if content is None else {name: part["kind"] for name, part in content.items()}


def check_kinds(root: Path, listed: Mapping[str, str], found: Collection[str]) -> None:
    """Checks that the drafts in directories are of the kinds that the manifest lists for them.

    Raises:
        ValueError: a draft is of another kind.
    """
    kinds = sorted(listed.values())
    if kinds != sorted(found):
        raise ValueError(
            f"{root / MANIFEST}: lists drafts of kind {', '.join(kinds) or 'none'}, the "
            f"directories hold {', '.join(sorted(found)) or 'none'}; convert the model again"
        )


def check(root: Path, *, whole: bool = False, skip: Collection[str] = ()) -> dict[str, str] | None:
    """Compares a directory with its manifest.

    Args:
        root: directory of the model.
        whole: compare the checksums of files over 64 MiB too.
        skip: names of directories to skip.

    Returns:
        The kind of each directory, or None if there is no manifest.

    Raises:
        ValueError: a listed file is missing or differs, or another version wrote the manifest.
    """
    content = _read(root)
    if content is None:
        return None
    for name, part in content.items():
        for file, expected in part["files"].items() if name not in skip else ():
            _check_file(root / name / file, expected, whole)
    return {name: part["kind"] for name, part in content.items()}


def _read(root: Path) -> dict[str, Any] | None:
    """Returns the parts in the manifest, each with its kind and files, or None without manifest."""
    path = root / MANIFEST
    if not path.is_file():
        return None
    content = files.read_json(path)
    if content.get("format") != "eagle_jax" or content.get("version") != VERSION:
        raise ValueError(
            f"{path}: has format {content.get('format')!r} and version {content.get('version')!r}, "
            f"known is 'eagle_jax' {VERSION}; use the eagle_jax that wrote it"
        )
    found = content.get("parts")
    if not (isinstance(found, dict) and "target" in found and all(map(_is_part, found.items()))):
        raise ValueError(f"{path}: is no manifest of eagle_jax; convert the model again")
    return found


def _is_part(item: tuple[str, Any]) -> bool:
    name, part = item
    if Path(name).name != name or not isinstance(part, dict):
        return False
    listed = part.get("files")
    if not isinstance(part.get("kind"), str) or not isinstance(listed, dict):
        return False
    return all(
        Path(file).name == file and isinstance(x, dict) and {"size", "sha256"} <= x.keys()
        for file, x in listed.items()
    )


def _check_file(path: Path, expected: Mapping[str, Any], whole: bool) -> None:
    remedy = f"copy it again, or delete {MANIFEST} if you changed it yourself"
    if not path.is_file():
        raise ValueError(f"{path}: no such file, though {MANIFEST} lists it; {remedy}")
    size = path.stat().st_size
    if size != expected["size"]:
        raise ValueError(
            f"{path}: has {size} bytes, {MANIFEST} says {expected['size']}: truncated or changed; "
            f"{remedy}"
        )
    if (whole or size <= _QUICK) and fingerprint.of_file(path) != expected["sha256"]:
        raise ValueError(f"{path}: differs from the file that {MANIFEST} lists; {remedy}")
