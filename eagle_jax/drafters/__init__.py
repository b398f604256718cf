"""Kinds of drafts, one folder each, and the registry through which all other code finds them.

| file | holds |
|---|---|
| `config.py` | the architecture, and the settings of its training |
| `module.py` | the Flax module |
| `checkpoint.py` | its files: how they are recognised, read, written and exported |
| `objective.py` | the training objective, and the checks before a run |
| `method.py` | the decoding method |
| `tuning.py` | the settings that `eagle_jax.tune` tries, and the prediction of their speed |
| `__init__.py` | `SPEC`, which names these parts |

To add your own drafter, write a `DrafterSpec` and `register` it, or name it in an entry point.
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
