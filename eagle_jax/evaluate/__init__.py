"""Compares decoding methods with one baseline, this package's own vanilla decoding.

python -m eagle_jax.evaluate --config configs/eval/tiny.py
"""

from types import ModuleType

from eagle_jax import lazy
from eagle_jax.evaluate.config import EvalConfig

__all__ = ["EvalConfig"]


def __getattr__(name: str) -> ModuleType:
    return lazy.submodule(__name__, name)


def __dir__() -> list[str]:
    return lazy.names(__name__)
