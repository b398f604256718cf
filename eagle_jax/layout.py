"""How a model's weights lie in memory, apart from what the model computes."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which arrays hold a model's weights, as `eagle_jax.load` chose them.

    A configuration says what is computed; modules take a layout beside it. Models without such
    matrices (Medusa has neither gates nor attention) ignore the first two fields.

    Attributes:
        gate_up_fused: gate and up projections are one matrix [d, 2, f], and the experts of a layer
            one stack of matrices.
        qkv_fused: query, key and value projections are one matrix [d, k (g + 2) e], as our GPU
            kernels read them.
        quantize: "int8" stores the matrices of layers and heads in eight bits, with a scale for
            every output (`eagle_jax.models.quantize`); None keeps them as floats.
    """

    gate_up_fused: bool = False
    qkv_fused: bool = False
    quantize: Literal["int8"] | None = None


PLAIN = Layout()
"""The layout of files and of training: every projection and every expert is an array of floats."""
