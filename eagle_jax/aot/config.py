"""Configuration of ahead-of-time compilation."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from eagle_jax import settings
from eagle_jax.config import DraftConfig, TrainConfig, TransformerConfig


@dataclasses.dataclass(frozen=True)
class AotConfig:
    """The programs to compile, and the machine to compile them for.

    Attributes:
        topology: a TPU slice as libtpu names it ("v5e:2x4", "v5p:2x2x2", "v6e:2x4"), or kind and
            number of GPUs in one host ("h100:1", "h200:2").
        target: architecture of the target.
        draft: architecture of the draft, if the method has one.
        method: the decoding method (`eagle_jax.decode`), or None to compile training only.
        tensor, expert: mesh axes of decoding; the remaining devices form the batch axis.
        batch_size: rows decoded together.
        prompt: tokens of the prompt, a power of two.
        new_tokens: tokens of the longest answer.
        quantize, quantize_drafts: "int8" stores the matrices of the target or of the draft in eight
            bits, as `eagle_jax.load` does; None keeps them in bfloat16.
        train: a training run whose step is compiled too, or None; its data config only gives
            `sequence_length` and `batch_size`.
    """

    topology: str
    target: TransformerConfig
    draft: DraftConfig | None = None
    method: Any = None
    tensor: int = 1
    expert: int = 1
    batch_size: int = 1
    prompt: int = 1024
    new_tokens: int = 1024
    quantize: Literal["int8"] | None = None
    quantize_drafts: Literal["int8"] | None = None
    train: TrainConfig | None = None

    def __post_init__(self) -> None:
        settings.check(self)
        for name in ("tensor", "expert", "batch_size", "prompt", "new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.method is None and self.train is None:
            raise ValueError("method=None: give a method, or a training run in `train`")
