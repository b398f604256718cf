"""Checks and locks of files that programs write, and errors that name them.

Only the first of several processes writes and locks (`eagle_jax.distributed`).
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows has no flock, so nothing is locked there
    fcntl = None

LOCK = ".lock"
# Errors of file systems without locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def check_file(field: str, path: Path) -> None:
    """Raises ValueError unless `path` is a regular file, or a name in a directory that exists.

    It never opens a device, a pipe or a directory: reading `/dev/full` would not end.
    """
    if "\0" in str(path):
        raise ValueError(f"{field}={str(path)!r}: holds a NUL byte; give a file name")
    if path.exists():
        if not path.is_file():
            raise ValueError(f"{field}={str(path)!r}: is not a regular file; give a file name")
    elif not path.parent.is_dir():
        raise ValueError(
            f"{field}={str(path)!r}: {str(path.parent)!r} is not a directory; create it first"
        )


def lock(file: IO[Any], field: str, path: Path, *, wait: bool = False) -> None:
    """Locks an open file until it is closed or the process ends, however it ends.

    Args:
        file: a file that is open for writing.
        field, path: the option and the path that the user gave, for the message.
        wait: wait for the other process; use it if locks are held for a moment only.

    Raises:
        ValueError: another process has locked it.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (BlockingIOError, PermissionError) as error:
        raise ValueError(
            f"{field}={str(path)!r}: another process is writing there; wait for it, or give "
            "another place"
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


@contextlib.contextmanager
def locked(field: str, path: Path, *, wait: bool = False) -> Iterator[None]:
    """Holds a lock on a directory (`.lock` in it) or on a file (`.NAME.lock` beside it).

    The lock file is removed afterwards. If a killed process leaves one, it does not block others.

    Args:
        field, path, wait: as in `lock`. The directory, or the parent of the file, must exist.

    Raises:
        ValueError: another process has locked it.
    """
    place = path / LOCK if path.is_dir() else path.with_name(f".{path.name}{LOCK}")
    while True:
        with _opened(place, path) as file:
            lock(file, field, path, wait=wait)
            # Another process may have removed the file after we opened and before we locked it.
            if not _is_at(file, place):
                continue
            try:
                yield
            finally:
                place.unlink(missing_ok=True)
            return


@contextlib.contextmanager
def claimed(field: str, directory: Path) -> Iterator[None]:
    """Creates a directory if it is missing, and locks it in the first process, inside `with`.

    Raises:
        ValueError: another program is writing there, or `directory` is a file.
        OSError: the directory cannot be created.
    """
    from eagle_jax import distributed  # imports JAX, which the rest of this module does not need

    with contextlib.ExitStack() as stack:
        error: ValueError | None = None
        if distributed.first():
            try:
                check_directory(field, directory)
                directory.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(field, directory))
            except ValueError as found:
                error = found
        distributed.raise_together(error, f"{field}={str(directory)!r}")
        yield


def check_directory(field: str, directory: str | Path) -> None:
    """Raises ValueError unless `directory` is a directory or can be created as one."""
    name = str(directory)
    if not name or "\0" in name:
        raise ValueError(f"{field}={name!r}: is no name of a directory; give one")
    if Path(name).expanduser().exists() and not Path(name).expanduser().is_dir():
        raise ValueError(f"{field}={name!r}: is not a directory; give another name")


@contextlib.contextmanager
def closing(file: IO[str], path: Path) -> Iterator[IO[str]]:
    """Closes a file after the block; an error of the final write, on closing, names the file."""
    try:
        yield file
    finally:
        with naming(path):
            file.close()


def write_text(path: Path, text: str) -> None:
    """Writes a text file; an error names the file."""
    with naming(path):
        path.write_text(text, encoding="utf-8")


def _opened(place: Path, path: Path) -> IO[str]:
    """Opens the lock file of `path`; an error names `path`, the file that the user knows."""
    try:
        return open(place, "a", encoding="utf-8")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _is_at(file: IO[Any], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Adds the file's name to errors that lack one, such as the error of a full disk.

    Raises:
        OSError: the error that the block raised, with `path` as its `filename`.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
