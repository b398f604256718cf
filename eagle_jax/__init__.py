"""EAGLE speculative decoding for JAX: the text of vanilla decoding in fewer target passes."""

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
    # Imported on first use, so that `import eagle_jax` (for config classes, say) stays without JAX.
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    return lazy.submodule(__name__, name)


def __dir__() -> list[str]:
    """Returns the names of all attributes and submodules, whether or not they are imported yet."""
    return sorted({*lazy.names(__name__), *_HOME})


if sys.argv[:1] == ["-m"] or sys.argv[:1] and sys.argv[0].endswith("eagle-jax"):
    # `python -m eagle_jax.decode` and the command eagle-jax import this package before they run.
    # Ctrl-C during these imports must not print a traceback.
    _words = sys.orig_argv
    if "-m" not in _words or _words[_words.index("-m") + 1].split(".")[0] == __name__:
        from eagle_jax import interrupts

        interrupts.end_quietly()
