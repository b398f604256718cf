"""Readers of users' files; whatever is wrong in a file becomes a ValueError of one line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields number (from 1) and bytes of every line that is not blank.

    A file whose name ends in `.gz` is decompressed.

    Raises:
        ValueError: the file is not a regular file, or its gzip data are damaged or cut short.
    """
    check_path(path)
    number = 0
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, line
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(
                f"{path}:{number + 1}: damaged gzip ({error}); copy it again"
            ) from error


def check_path(path: Path) -> None:
    """Raises ValueError unless `path` is a regular file; reading a device might never end."""
    if "\0" in str(path):
        raise ValueError(f"{str(path)!r}: holds a NUL byte; give a file name")
    if not path.is_file():
        what = "is not a regular file" if path.exists() else "no such file"
        raise ValueError(f"{path}: {what}; give another name")


def parse_json(text: str | bytes, where: str, remedy: str) -> Any:
    """Returns the value of a JSON text.

    Raises:
        ValueError: it is not JSON, not UTF-8, nested too deeply, or has a number that is too long.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({one_line(error)}); {remedy}") from error


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """Returns the object in a JSON file, or an empty one if there is no such file.

    Raises:
        ValueError: the file is not one JSON object.
    """
    if not path.is_file():
        return {}
    content = parse_json(path.read_bytes(), str(path), remedy)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds no JSON object; {remedy}")
    return content


def one_line(error: object) -> str:
    """Returns an error's message on one line, or its type if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__
