"""Keeps compiled programs between runs, in the user's cache directory.

The commands call `enable`, so that their second run does not compile. The library does not, because
JAX has one such cache per process, which the program should control, and because JAX ignores a
directory that is set after the first compilation. Your own program can call

    eagle_jax.compilation_cache.enable()

or set JAX's `jax_compilation_cache_dir`. EAGLE_JAX_COMPILATION_CACHE=off switches the cache off.

JAX reads and writes the files. Their keys depend on the program, the compiler and its options, so
several processes can share them. `enable` bounds their total size itself: JAX's own bound,
`jax_compilation_cache_max_size`, locks every access, and JAX stops storing for good if a process
was killed between the two files of an entry.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import warnings
import zlib
from pathlib import Path

SWITCH = "EAGLE_JAX_COMPILATION_CACHE"
MAX_BYTES = 2 * 2**30
_LEAST = "jax_persistent_cache_min_compile_time_secs"
_LEAST_SECONDS = 0.2  # programs that compile faster than this are not stored
_CHECKED = ".checked"  # the time stamp of this file tells when the cache was last pruned


def root() -> Path:
    """Returns the cache directory, `eagle_jax/xla` in XDG_CACHE_HOME or `~/.cache`."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "eagle_jax" / "xla"


def enable() -> Path | None:
    """Stores the programs that this process compiles; call it before the first compilation.

    Settings of JAX's cache that the user or the program made take precedence
    (`JAX_COMPILATION_CACHE_DIR`, `jax.config`). If the directory cannot be written, nothing is
    stored, and decoding still works.

    Returns:
        The directory, or None if JAX's settings were left unchanged.
    """
    import jax

    if os.environ.get(SWITCH, "").lower() in ("off", "0", "false", "no"):
        return None
    values = jax.config.values
    given = values["jax_compilation_cache_dir"] is not None
    if given or not values["jax_enable_compilation_cache"]:
        return None
    directory = root() / _machine()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    if not os.access(directory, os.W_OK | os.X_OK):
        return None
    with contextlib.suppress(OSError):
        prune(root())
    # Users need no warning about a full disk or an entry that another process is writing.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
    jax.config.update("jax_compilation_cache_dir", str(directory))
    if values[_LEAST] == 1.0:  # JAX's default
        jax.config.update(_LEAST, _LEAST_SECONDS)
    return directory


def _machine() -> str:
    """Returns a name for this kind of host, since different CPUs may share a home directory."""
    features = platform.processor()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        features = next((x for x in lines if x.startswith(("flags", "Features"))), features)
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


def prune(folder: Path, max_bytes: int = MAX_BYTES) -> None:
    """Deletes truncated entries, then the least recently used ones until `max_bytes` remain.

    JAX never replaces an entry, so one truncated by a full disk or a kill would stay for good.
    """
    mark = folder / _CHECKED
    since = mark.stat().st_mtime if mark.exists() else 0.0
    mark.touch()
    entries, total = [], 0
    for path in folder.rglob("*-cache"):
        with contextlib.suppress(OSError):  # another process may delete the same file
            status = path.stat()
            if status.st_mtime >= since and _cut(path.read_bytes()):
                path.unlink()
                continue
            entries.append((max(status.st_atime, status.st_mtime), status.st_size, path))
            total += status.st_size
    for _, size, path in sorted(entries):
        if total <= max_bytes:
            break
        total -= size
        with contextlib.suppress(OSError):
            path.unlink()


def _cut(data: bytes) -> bool:
    """Returns whether an entry is truncated. JAX compresses with zstd if Python has it, or zlib."""
    if not data:
        return True
    if data[:1] == b"\x78":
        unpack = zlib.decompressobj()
        try:
            unpack.decompress(data)
        except zlib.error:
            return True
        return not unpack.eof
    if data[:4] == b"\x28\xb5\x2f\xfd":
        with contextlib.suppress(ImportError):
            from compression import zstd  # pyright: ignore[reportMissingImports]

            try:
                zstd.decompress(data)
            except zstd.ZstdError:
                return True
    return False
