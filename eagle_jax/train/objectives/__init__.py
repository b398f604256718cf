"""Training objectives: a loss as a function of parameters and a batch.

All objectives implement `Objective`. Next-token cross-entropy trains a target. The others belong to
drafters (`eagle_jax.drafters.<kind>.objective`) and train drafts against a frozen target, which
runs on the same batch unless the batch holds its stored features. All objectives work on packed
sequences: `loss_mask` marks assistant tokens, and a row counts in the loss if the token that it
predicts is marked.

| | row i reads | predicts | weight |
|---|---|---|---|
| next token | t_i | t_{i+1} | mask[i+1] |
| distillation of a small model | t_i | t_{i+1}'s distribution | mask[i+1] |
| features (EAGLE-1) | f_i, embedding of t_{i+1} | f_{i+1}, so t_{i+2}'s distribution | mask[i+2] |
| Medusa, head k | f_i | t_{i+2+k} | mask[i+2+k] |
| training-time test (EAGLE-3), step j | own state, embedding of t_{i+1+j} | t_{i+2+j}'s \
distribution | mask[i+2+j] |
"""

from eagle_jax.train.objectives.base import Batch, Objective, Sums, means
from eagle_jax.train.objectives.build import assemble, build, target_directory
from eagle_jax.train.objectives.next_token import NextTokenObjective

__all__ = [
    "Batch",
    "NextTokenObjective",
    "Objective",
    "Sums",
    "assemble",
    "build",
    "means",
    "target_directory",
]
