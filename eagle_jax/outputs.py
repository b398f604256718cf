"""Files that programs write: refused before they are harmed, locked, named in errors.

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
except ImportError:  # Windows has no flock: nothing is locked there
    fcntl = None

LOCK = ".lock"
# Errors of file systems that have no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def check_file(field: str, path: Path) -> None:
    """Raises ValueError unless `path` is a regular file, or a name in a directory that exists.

    A device, a pipe or a directory is never opened: reading `/dev/full` would not end.
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


def lock(file: IO[Any], field: str, path: Path) -> None:
    """Locks an open file until it is closed or the process ends, however it ends.

    Raises:
        ValueError: another process has locked it.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise ValueError(
            f"{field}={str(path)!r}: another process is writing there; wait for it, or give "
            "another place"
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


@contextlib.contextmanager
def locked_directory(field: str, directory: Path) -> Iterator[None]:
    """Holds the lock of a directory, which must exist; its lock file is removed afterwards.

    Raises:
        ValueError: another process has locked it.
    """
    path = directory / LOCK
    while True:
        with open(path, "a", encoding="utf-8") as file:
            lock(file, field, directory)
            # A process that ended has removed the file between our opening and locking it.
            if not _is_at(file, path):
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _is_at(file: IO[Any], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Adds the file's name to errors that lack one, such as that of a full disk.

    Raises:
        OSError: what the block raised, with `path` as its `filename`.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
