"""Kinds of drafts, one folder each, and the registry that all code finds them in.

| file | holds |
|---|---|
| `config.py` | the architecture, and the settings of its training |
| `module.py` | the Flax module |
| `checkpoint.py` | its files: how they are recognised, read, written and exported |
| `objective.py` | its training objective, and the checks before a run |
| `method.py` | the decoding method |
| `tuning.py` | which settings `eagle_jax.tune` tries, and what it expects of them |
| `__init__.py` | `SPEC`, which names these |

A drafter of your own is a `DrafterSpec` too: `register` it, or name it in an entry point.
"""

from eagle_jax.drafters.registry import (
    by_config,
    by_kind,
    by_objective,
    methods,
    recognise,
    register,
    specs,
)
from eagle_jax.drafters.spec import DrafterSpec

__all__ = [
    "DrafterSpec",
    "by_config",
    "by_kind",
    "by_objective",
    "methods",
    "recognise",
    "register",
    "specs",
]
