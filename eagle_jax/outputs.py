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


def lock(file: IO[Any], field: str, path: Path, *, wait: bool = False) -> None:
    """Locks an open file until it is closed or the process ends, however it ends.

    Args:
        file: open for writing.
        field, path: what the user gave, for the message.
        wait: wait for the other process, which holds the lock for a moment only.

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
    """Holds the lock of a directory (`.lock` in it), or of a file (`.NAME.lock` beside it).

    The lock file is removed afterwards; what a killed process leaves of it locks nobody out.

    Args:
        field, path, wait: as in `lock`. The directory, or the one around a file, must exist.

    Raises:
        ValueError: another process has locked it.
    """
    place = path / LOCK if path.is_dir() else path.with_name(f".{path.name}{LOCK}")
    while True:
        with _opened(place, path) as file:
            lock(file, field, path, wait=wait)
            # A process that ended may have removed the file between our opening and locking it.
            if not _is_at(file, place):
                continue
            try:
                yield
            finally:
                place.unlink(missing_ok=True)
            return


@contextlib.contextmanager
def claimed(field: str, directory: Path) -> Iterator[None]:
    """A directory to write into: made if missing, and locked by the first process.

    Raises:
        ValueError: another program is writing there, or `directory` is a file.
        OSError: it cannot be made.
    """
    from eagle_jax import distributed  # which needs JAX; the rest of this module does not

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
    """Raises ValueError unless `directory` is one, or a name that can become one."""
    name = str(directory)
    if not name or "\0" in name:
        raise ValueError(f"{field}={name!r}: is no name of a directory; give one")
    if Path(name).expanduser().exists() and not Path(name).expanduser().is_dir():
        raise ValueError(f"{field}={name!r}: is not a directory; give another name")


@contextlib.contextmanager
def closing(file: IO[str], path: Path) -> Iterator[IO[str]]:
    """Closes a file after the block; an error of the last write, which closing does, names it."""
    try:
        yield file
    finally:
        with naming(path):
            file.close()


def write_text(path: Path, text: str) -> None:
    """Writes a text file; an error names it."""
    with naming(path):
        path.write_text(text, encoding="utf-8")


def _opened(place: Path, path: Path) -> IO[str]:
    """The lock file of `path`; an error names `path`, since nobody asked for a lock file."""
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
