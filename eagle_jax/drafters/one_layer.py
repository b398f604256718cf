"""Common code for the files of EAGLE-1 and EAGLE-3 heads, which have one Llama decoder layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from eagle_jax.checkpoint import config_json
from eagle_jax.checkpoint.files import LazyTensors
from eagle_jax.checkpoint.lazy_tensor import LazyTensor
from eagle_jax.config import TransformerConfig
from eagle_jax.drafters import draft_vocabulary
from eagle_jax.drafters.files import EMBEDDING, NATIVE, DraftFiles, ExportTarget


class OneLayerFiles(DraftFiles):
    """Files of a head with one decoder layer.

    Attributes:
        layer: prefix of the layer's tensor names in the official layout.
    """

    layer: ClassVar[str]
    rotates = True

    def settings(self, config: Any, dtype: str, coverage: float | None = None) -> dict[str, Any]:
        settings = config_json.draft_json(config, dtype) | {
            "num_hidden_layers": 1,
            "qkv_bias": config.attention_bias,
        }
        if config.draft_vocab_size is not None:
            settings["draft_vocab_size"] = config.draft_vocab_size
        return settings if coverage is None else settings | {draft_vocabulary.COVERAGE: coverage}

    def export_settings(
        self, config: Any, layout: str, dtype: str, target: ExportTarget | None
    ) -> dict[str, Any]:
        settings = self.settings(config, dtype)
        if target is not None:
            # Without this key, serving stacks limit positions to transformers' default of 2048.
            settings["max_position_embeddings"] = target.config.max_position_embeddings
        if config.attention_bias and layout not in ("official", NATIVE):
            settings["attention_bias"] = True
        return settings

    def export_tensors(
        self, config: Any, params: Mapping[str, Any], layout: str, dtype: str
    ) -> dict[str, Any]:
        tensors = super().export_tensors(config, params, layout, dtype)
        if config.attention_bias and layout not in ("official", NATIVE):
            # Serving stacks have a bias on every attention projection or on none.
            zeros = np.zeros(config.hidden_size, dtype)
            tensors[f"{self.layer}self_attn.o_proj.bias"] = zeros
        return tensors

    def unsaid(self, config: Any, target: TransformerConfig | None) -> list[str]:
        del target
        found = []
        if config.head_dim * config.num_attention_heads != config.hidden_size:
            found.append(f"head_dim={config.head_dim}")
        if config.rope_scaling is not None and config.rope_scaling.rope_type != "linear":
            found.append(f"rope_scaling {config.rope_scaling.rope_type!r}")
        return found

    def biases(self, settings: Mapping[str, Any], tensors: LazyTensors) -> dict[str, Any]:
        """Returns `settings` with `qkv_bias`, derived from the tensors if the key is missing.

        The key is missing in Qwen's heads. Serving stacks use `attention_bias` instead and also
        have a bias of o_proj. Our layer has none, so a bias of zeros is removed from `tensors`.
        """
        found = f"{self.layer}self_attn.q_proj.bias" in tensors
        own = {key: value for key, value in settings.items() if key != "attention_bias"}
        if not found:
            own = dict(settings)
        name = f"{self.layer}self_attn.o_proj.bias"
        if name in tensors and not np.any(np.asarray(tensors[name]).astype(np.float32)):
            del tensors[name]
        return {"qkv_bias": found, **own}


def own_embedding(tensors: Mapping[str, LazyTensor]) -> LazyTensor | None:
    """Returns the copy of the target's embedding in a draft's file, or None."""
    return tensors.get(EMBEDDING, tensors.get(f"model.{EMBEDDING}"))


def same_matrix(own: LazyTensor, embedding: LazyTensor, *, sample: bool = False) -> bool:
    """Returns whether a copy equals a matrix, up to the rounding of 16-bit formats.

    Args:
        own: the copy.
        embedding: the matrix.
        sample: whether to compare only a few rows, without reading the others.
    """
    if own.shape != embedding.shape:
        return False
    rows = 32 if sample else 1024  # float32 copies of all rows would need too much memory
    starts = range(0, len(own), max(rows, len(own) // 16) if sample else rows)
    for one, two in zip(own.blocks(starts, rows), embedding.blocks(starts, rows), strict=True):
        wide, other = one.astype(np.float32), two.astype(np.float32)
        if np.any(np.abs(wide - other) > 0.01 * np.abs(other) + 1e-6):
            return False
    return True
