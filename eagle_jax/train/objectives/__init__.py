"""What is trained, and against what: a loss as a function of parameters.

Five objectives behind one interface, `Objective`. Next-token cross-entropy trains a target, the
others train drafts against a frozen target, which runs on the same batch or left its features there
before. All work on packed sequences: `loss_mask` marks assistant tokens, and a row counts if the
token whose distribution it predicts is marked.

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
from eagle_jax.train.objectives.distillation import DistillationObjective
from eagle_jax.train.objectives.eagle1 import FeatureRegressionObjective
from eagle_jax.train.objectives.eagle3 import TrainingTimeTestObjective
from eagle_jax.train.objectives.medusa import MedusaObjective
from eagle_jax.train.objectives.next_token import NextTokenObjective

__all__ = [
    "Batch",
    "DistillationObjective",
    "FeatureRegressionObjective",
    "MedusaObjective",
    "NextTokenObjective",
    "Objective",
    "Sums",
    "TrainingTimeTestObjective",
    "assemble",
    "build",
    "means",
    "target_directory",
]
