"""Evaluation: every decoding method beside the others, under one baseline, our own vanilla loop.

python -m eagle_jax.evaluate --config configs/eval/tiny.py
"""

from eagle_jax.evaluate.config import EvalConfig

__all__ = ["EvalConfig"]
