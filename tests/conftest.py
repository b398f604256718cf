"""Strict settings for every test, in the environment so that programs under test inherit them."""

import ctypes
import os
import sys
from importlib.metadata import version
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "eagle_jax" / "tests"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    # Most of a first run's time is compilation, which this halves.
    + " --xla_backend_optimization_level=0"
    # Halves it again. Newer versions refuse the flag.
    + (" --xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else "")
)
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
# Compiled programs outlive the run: most of a first run's time is compilation.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import jax  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

assert "raise" in str(jax.config.values["jax_numpy_rank_promotion"]), "jax was imported earlier"

# config.py checks its own types and must be seen doing so: it is imported before the hook.
import eagle_jax.config  # noqa: E402, F401

install_import_hook("eagle_jax", "strict.typecheck")


# One compiled program takes 1.4 MB, the smallest too, and a file of tests may compile 1,500.
MOST_MEMORY = 2 * 2**30


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Keeps the memory of a process small; programs that took long are in the cache on disk."""
    yield
    _forget()


@pytest.fixture(autouse=True)
def _bounded_memory():
    """Forgets compiled programs before the end of a file that has very many."""
    yield
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        if pages * os.sysconf("SC_PAGE_SIZE") > MOST_MEMORY:
            _forget()


def _forget() -> None:
    from eagle_jax.decode import executables

    executables.forget()
    jax.clear_caches()
    if sys.platform == "linux":  # glibc would keep what was freed
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory for programs: random pair, bytes for a vocabulary."""
    import tiny_pair

    return tiny_pair.write(tmp_path_factory.mktemp("tiny_model"))
