"""Files of Medusa heads: for each head its residual blocks, then its vocabulary matrix.

The `config.json` of published heads has no sizes; they are derived from the tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eagle_jax.checkpoint import config_json, files
from eagle_jax.checkpoint.files import LazyTensors
from eagle_jax.config import TransformerConfig
from eagle_jax.drafters.files import DraftFiles
from eagle_jax.drafters.medusa.config import MedusaConfig

_PREFIX = "medusa_head."
_KEYS = {
    "num_heads": "medusa_num_heads",
    "num_layers": "medusa_num_layers",
    "hidden_size": "hidden_size",
    "vocab_size": "vocab_size",
    "tie_lm_head": "tie_lm_head",
}
_BLOCK = re.compile(rf"({re.escape(_PREFIX)})?\d+\.\d+\.linear\.(weight|bias)")


class MedusaFiles(DraftFiles):
    """Files of Medusa heads."""

    other_names = ("medusa_lm_head.safetensors", "medusa_lm_head.pt")  # the official code's names
    size_keys = ("medusa_num_heads", "medusa_num_layers")

    def recognises(self, settings: Mapping[str, Any], names: Sequence[str]) -> bool:
        return "medusa_num_heads" in settings or any(_BLOCK.fullmatch(name) for name in names)

    def disk_name(self, config: MedusaConfig, name: str) -> tuple[str, bool]:
        """Returns a name in one list per head: its blocks by number, then its vocabulary matrix."""
        disk, transposed = super().disk_name(config, name)
        disk = disk.removeprefix("heads.").replace(".lm_head.", f".{config.num_layers}.")
        return disk.replace(".blocks.", "."), transposed

    def settings(
        self, config: MedusaConfig, dtype: str, coverage: float | None = None
    ) -> dict[str, Any]:
        del coverage
        return {
            "architectures": ["MedusaModel"],
            "model_type": "medusa",
            **{key: getattr(config, name) for name, key in _KEYS.items()},
            "dtype": dtype,
            "torch_dtype": dtype,
        }

    def read(
        self,
        directory: Path,
        settings: Mapping[str, Any],
        tensors: LazyTensors,
        target: TransformerConfig | None,
    ) -> tuple[MedusaConfig, LazyTensors]:
        tensors = {name.removeprefix(_PREFIX): array for name, array in tensors.items()}
        counts = ("medusa_num_heads", "medusa_num_layers")
        files.check_counts(directory, settings, counts, tensors)
        layers = settings.get("medusa_num_layers", 1)
        block, head = tensors.get("0.0.linear.weight"), tensors.get(f"0.{layers}.weight")
        found: dict[str, Any] = {"num_layers": layers, "tie_lm_head": head is None}
        if block is not None:
            found["hidden_size"] = block.shape[0]
        if head is not None:
            found["vocab_size"] = head.shape[0]
        elif target is not None:
            found["vocab_size"] = target.vocab_size
        for name, key in _KEYS.items():
            if key in settings:
                found[name] = settings[key]
            elif name not in found:
                raise ValueError(f"{directory / 'config.json'}: has no {key}; add it")
        config = config_json.build(directory, MedusaConfig, lambda: found)
        return config, files.arrays(directory, config, tensors)

    def export_files(self, layout: str) -> tuple[str, ...]:
        return ("medusa_lm_head.safetensors" if layout == "official" else "model.safetensors",)

    def unsaid(self, config: MedusaConfig, target: TransformerConfig | None) -> list[str]:
        del target
        return ["tie_lm_head=True"] if config.tie_lm_head else []
