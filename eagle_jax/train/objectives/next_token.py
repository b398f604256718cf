"""Next-token cross-entropy, the objective that trains a target."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from eagle_jax import config as configs
from eagle_jax.checkpoint import hf
from eagle_jax.models import Transformer, bind, init_params
from eagle_jax.models.attention import AttentionKernel
from eagle_jax.models.transformer import packed_mask
from eagle_jax.text import Tokenizer
from eagle_jax.train.objectives.base import (
    Batch,
    Sums,
    head_kernel,
    means,
    next_weights,
    project,
    rank,
    shift,
    transformer_flops,
    weighted_sums,
)
from eagle_jax.types import Hidden, ParamDict

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)


@dataclasses.dataclass(frozen=True)
class NextTokenObjective:
    """Cross-entropy of the next token, over assistant tokens.

    Attributes:
        config: the architecture of the target.
        kernel, remat: as in `TrainConfig` (`attention`, `remat`).
    """

    config: configs.TransformerConfig
    kernel: AttentionKernel = "xla"
    remat: bool = False

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def init(self, seed: int, frozen: Mapping[str, Any]) -> ParamDict:
        del frozen
        return init_params(Transformer, self.config, seed)

    def frozen(self) -> Mapping[str, Any]:
        return {}

    def loss(
        self, trainable: ParamDict, frozen: ParamDict, batch: Batch, key: jax.Array | None
    ) -> tuple[jax.Array, Sums]:
        del frozen, key
        model = bind(Transformer, self.config, trainable)
        mask = packed_mask(batch["segment_ids"])
        features = model(
            batch["tokens"], batch["positions"], mask, kernel=self.kernel, remat=self.remat
        ).features
        labels = shift(batch["tokens"], 1)

        def rows(features: Hidden, head: Array) -> dict[str, Array]:
            logits = project(features, head)
            own = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
            return {
                "loss": jax.nn.logsumexp(logits, axis=-1) - own,
                "top1": rank(logits, labels) < 1,
            }

        rows = jax.checkpoint(rows) if self.remat else rows
        sums = weighted_sums(
            next_weights(batch, 1), rows(features, head_kernel(self.config, trainable))
        )
        return means(sums)["loss"], sums

    def flops_per_token(self, sequence_length: int) -> float:
        return 3.0 * sum(transformer_flops(self.config, sequence_length))

    def export(
        self, directory: Path, params: Mapping[str, Any], dtype: str, tokenizer: Path
    ) -> None:
        special = Tokenizer.load(tokenizer)
        hf.save_target(
            directory,
            self.config,
            params,
            dtype,
            bos_token_id=special.bos_id,
            eos_token_id=special.eos_ids or None,
        )
        _copy_tokenizer(tokenizer, directory)


def _copy_tokenizer(source: Path, directory: Path) -> None:
    folder = source if source.is_dir() else source.parent
    for name in _TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, directory / name)
    if source.is_file():  # its own name may differ
        shutil.copyfile(source, directory / "tokenizer.json")
