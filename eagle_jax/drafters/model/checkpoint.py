"""Files of an independent draft model, which have the format of a target's files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eagle_jax.checkpoint import target as targets
from eagle_jax.checkpoint.files import LazyTensors
from eagle_jax.checkpoint.lazy_tensor import LazyTensor
from eagle_jax.checkpoint.names import Shape
from eagle_jax.config import TransformerConfig
from eagle_jax.drafters.files import DraftFiles


class ModelFiles(DraftFiles):
    """Files of a complete model."""

    layouts = ()
    whole = True
    rotates = True

    def recognises(self, settings: Mapping[str, Any], names: Sequence[str]) -> bool:
        """Returns True: this drafter is asked last, for files that no other one recognises."""
        del settings, names
        return True

    def shapes(self, config: TransformerConfig) -> dict[str, Shape]:
        return targets.shapes(config)

    def disk_name(self, config: TransformerConfig, name: str) -> tuple[str, bool]:
        return targets.disk_name(config, name)

    def settings(
        self, config: TransformerConfig, dtype: str, coverage: float | None = None
    ) -> dict[str, Any]:
        del coverage
        return targets.settings(config, dtype)

    def read(
        self,
        directory: Path,
        settings: Mapping[str, Any],
        tensors: LazyTensors,
        target: TransformerConfig | None,
    ) -> tuple[TransformerConfig, LazyTensors]:
        del target
        return targets.read(directory, settings, tensors)

    def sizes(self, config: TransformerConfig) -> dict[str, int]:
        return {"vocab_size": config.vocab_size}  # its width may differ from the target's

    def for_decoding(
        self,
        config: TransformerConfig,
        params: Mapping[str, LazyTensor],
        target_config: TransformerConfig,
        target: Mapping[str, LazyTensor],
        *,
        untied: bool,
        quantised: bool,
    ) -> tuple[TransformerConfig, Mapping[str, LazyTensor]]:
        del target_config, target
        return targets.untied(config, params) if untied or quantised else (config, params)

    def as_layout(
        self, config: TransformerConfig, params: Mapping[str, Any], layout: str
    ) -> tuple[TransformerConfig, Mapping[str, Any]]:
        raise ValueError("draft: is a model of its own; write it in format 'hf'")

    def lacks(
        self, directory: Path, settings: Mapping[str, Any], names: Sequence[str]
    ) -> list[str]:
        others = ("tokenizer.json", "generation_config.json")
        missing = [name for name in others if not (directory / name).is_file()]
        return missing + super().lacks(directory, settings, names)
