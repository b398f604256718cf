"""Checkpoints from one layout to another: `python -m eagle_jax.convert`, or `convert` in Python."""

from eagle_jax.convert.conversion import FORMATS, convert, inspect
from eagle_jax.convert.source import Source

__all__ = ["FORMATS", "Source", "convert", "inspect"]
