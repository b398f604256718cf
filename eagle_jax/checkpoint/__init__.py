"""Models on disk: safetensors files, Hugging Face directories, training checkpoints."""

from types import ModuleType

from eagle_jax import lazy


def __getattr__(name: str) -> ModuleType:
    return lazy.submodule(__name__, name)


def __dir__() -> list[str]:
    return lazy.names(__name__)
