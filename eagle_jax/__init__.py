"""EAGLE speculative decoding for JAX: vanilla decoding's text, in a fraction of the passes."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eagle_jax.decode import generate, stream
    from eagle_jax.params import Params, load

__version__ = "0.2.0"
__all__ = ["Params", "generate", "load", "stream"]

_MODULES = (
    "config",
    "decode",
    "evaluate",
    "models",
    "params",
    "settings",
    "testing",
    "text",
    "train",
    "tune",
)
_HOME = {
    "Params": "eagle_jax.params",
    "generate": "eagle_jax.decode",
    "load": "eagle_jax.params",
    "stream": "eagle_jax.decode",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that `import eagle_jax` (for its config classes, say) does not import JAX.
    if name in _MODULES:
        return importlib.import_module(f"eagle_jax.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'eagle_jax' has no attribute {name!r}")
