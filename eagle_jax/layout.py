"""The layout of a model's weights in memory, which does not affect what the model computes."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Layout:
    """The arrays in which a model's weights are stored, as chosen by `eagle_jax.load`.

    The configuration defines the computation; modules take the layout as a second argument. Models
    without the matrices in question (Medusa has neither gates nor attention) ignore the first two
    fields.

    Attributes:
        gate_up_fused: store gate and up projections as one matrix [d, 2, f], and a layer's experts
            as one stack of matrices.
        qkv_fused: store query, key and value projections as one matrix [d, k (g + 2) e], which our
            GPU kernels read.
        quantize: "int8" stores the matrices of layers and heads in eight bits, with one scale per
            output (`eagle_jax.models.quantize`); None keeps them as floats.
    """

    gate_up_fused: bool = False
    qkv_fused: bool = False
    quantize: Literal["int8"] | None = None


PLAIN = Layout()
"""The layout of files and of training: every projection and every expert is an array of floats."""
