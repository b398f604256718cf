"""Submodules as attributes: `eagle_jax.decode.batching.answer_file` after `import eagle_jax`."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from types import ModuleType


def submodule(package: str, name: str) -> ModuleType:
    """Imports and returns a submodule; what a package's `__getattr__` returns.

    Raises:
        AttributeError: the package has none of that name.
    """
    path = f"{package}.{name}"
    if name.startswith("_") or importlib.util.find_spec(path) is None:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return importlib.import_module(path)


def names(package: str) -> list[str]:
    """Returns a package's public names and its submodules, imported or not, for its `__dir__`."""
    module = sys.modules[package]
    found = (found.name for found in pkgutil.iter_modules(module.__path__))
    special = (name for name in vars(module) if name.startswith("__"))
    public = (name for name in found if not name.startswith("_"))
    return sorted({*module.__all__, *special, *public})
