"""EAGLE speculative decoding for JAX: vanilla decoding's text, in a fraction of the passes."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from eagle_jax import lazy

if TYPE_CHECKING:
    from eagle_jax.decode import Batcher, SamplingParams, Session, generate, stream
    from eagle_jax.params import Params, load

__version__ = "0.2.0"
__all__ = ["Batcher", "Params", "SamplingParams", "Session", "generate", "load", "stream"]

_HOME = {
    "Batcher": "eagle_jax.decode",
    "Params": "eagle_jax.params",
    "SamplingParams": "eagle_jax.decode",
    "Session": "eagle_jax.decode",
    "generate": "eagle_jax.decode",
    "load": "eagle_jax.params",
    "stream": "eagle_jax.decode",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that `import eagle_jax` (for its config classes, say) does not import JAX.
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    return lazy.submodule(__name__, name)


def __dir__() -> list[str]:
    """Everything that can be read from this package, whether or not it is imported yet."""
    return sorted({*lazy.names(__name__), *_HOME})


if sys.argv[:1] == ["-m"]:
    # Python imports the packages around a module that it runs (`python -m eagle_jax.decode`)
    # before the module itself. Ctrl-C during that time is not to end in a traceback.
    _words = sys.orig_argv
    if _words[_words.index("-m") + 1].split(".")[0] == __name__:
        from eagle_jax import interrupts

        interrupts.end_quietly()
