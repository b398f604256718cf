"""Continuous batching: requests enter and leave the batch between two chunks of the loop."""

from types import ModuleType

from eagle_jax import lazy


def __getattr__(name: str) -> ModuleType:
    return lazy.submodule(__name__, name)


def __dir__() -> list[str]:
    return lazy.names(__name__)
