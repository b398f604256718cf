"""Files of EAGLE-1 heads: `fc`, one decoder layer without input norm, optionally an embedding.

The embedding is a frozen copy of the target's and is ignored. A draft vocabulary is an extension of
this library: its `d2t` is stored with the weights. Its head consists of columns of the target's
head and is not stored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eagle_jax.checkpoint import config_json, files
from eagle_jax.checkpoint.files import LazyTensors
from eagle_jax.checkpoint.lazy_tensor import LazyTensor, lazily
from eagle_jax.checkpoint.names import Shape
from eagle_jax.config import TransformerConfig
from eagle_jax.drafters import draft_vocabulary
from eagle_jax.drafters.eagle.config import EagleConfig
from eagle_jax.drafters.files import EMBEDDING, NATIVE, Embedding, ExportTarget
from eagle_jax.drafters.one_layer import OneLayerFiles


class EagleFiles(OneLayerFiles):
    """Files of EAGLE-1 heads, which EAGLE-2 also uses."""

    layouts = ("official", "sglang")
    shortens = True
    layer = "layers.0."

    def recognises(self, settings: Mapping[str, Any], names: Sequence[str]) -> bool:
        if not any(name.startswith(("fc.", self.layer)) for name in names):
            return False
        if "draft_vocab_size" in settings or any(name in ("d2t", "t2d") for name in names):
            return not any(name.endswith("lm_head.weight") for name in names)
        return not any(name.startswith("model.") for name in names)

    def shapes(self, config: EagleConfig) -> dict[str, Shape]:
        found = super().shapes(config)
        found.pop("lm_head.kernel", None)  # not stored: columns of the target's head
        return found

    def settings(
        self, config: EagleConfig, dtype: str, coverage: float | None = None
    ) -> dict[str, Any]:
        return super().settings(config, dtype, coverage) | {"bias": config.bias}

    def read(
        self,
        directory: Path,
        settings: Mapping[str, Any],
        tensors: LazyTensors,
        target: TransformerConfig | None,
    ) -> tuple[EagleConfig, LazyTensors]:
        del target
        tensors = dict(tensors)
        settings = {"bias": "fc.bias" in tensors, **self.biases(settings, tensors)}
        config = config_json.draft_from_json(directory, EagleConfig, settings)
        if config.draft_vocab_size == config.vocab_size and "d2t" not in tensors:
            config = dataclasses.replace(config, draft_vocab_size=None)
        if config.draft_vocab_size is None:
            return config, files.arrays(directory, config, tensors, EMBEDDING)
        found = draft_vocabulary.pop_tables(tensors)
        params = files.arrays(directory, config, tensors, EMBEDDING)
        params["d2t"] = draft_vocabulary.checked_offsets(directory, config, *found)
        return config, params

    def shares_embedding(self, config: EagleConfig) -> bool:
        del config
        return True

    def for_decoding(
        self,
        config: EagleConfig,
        params: Mapping[str, LazyTensor],
        target_config: TransformerConfig,
        target: Mapping[str, LazyTensor],
        *,
        untied: bool,
        quantised: bool,
    ) -> tuple[EagleConfig, Mapping[str, LazyTensor]]:
        """Adds the draft vocabulary's columns of the target's head, if there is a draft vocabulary.

        They are gathered when they are read. A quantised draft without a draft vocabulary gets all
        columns, since the format of its head differs from that of the target's.
        """
        del untied
        if quantised and config.draft_vocab_size is None:
            size = config.vocab_size
            config = dataclasses.replace(config, draft_vocab_size=size)
            params = {**params, "d2t": lazily(np.zeros(size, np.int32))}
        if config.draft_vocab_size is None:
            return config, params
        tokens = draft_vocabulary.target_tokens("params", config, np.asarray(params["d2t"]))
        tied = target_config.tie_word_embeddings
        rows = target["embed_tokens.embedding"] if tied else target["lm_head.kernel"].T
        return config, {**params, "lm_head.kernel": rows.rows(tokens).T}

    def with_vocabulary(
        self, config: EagleConfig, params: Mapping[str, Any], offsets: np.ndarray
    ) -> tuple[EagleConfig, Mapping[str, Any]]:
        shorter = dataclasses.replace(config, draft_vocab_size=len(offsets))
        return shorter, {**params, "d2t": lazily(offsets)}

    def as_layout(
        self, config: EagleConfig, params: Mapping[str, Any], layout: str
    ) -> tuple[EagleConfig, Mapping[str, Any]]:
        if layout != NATIVE and config.draft_vocab_size is not None:
            config = dataclasses.replace(config, draft_vocab_size=None)
            params = {name: array for name, array in params.items() if name != "d2t"}
        if layout == "sglang" and not config.bias:
            # SGLang always creates this bias and leaves it random if the file has none.
            bias = np.zeros(config.hidden_size, lazily(params["fc.kernel"]).dtype)
            return dataclasses.replace(config, bias=True), {**params, "fc.bias": bias}
        return config, params

    def export_settings(
        self, config: EagleConfig, layout: str, dtype: str, target: ExportTarget | None
    ) -> dict[str, Any]:
        settings = super().export_settings(config, layout, dtype, target)
        if layout != "sglang":
            return settings
        # In SGLang `bias` means a bias of the attention projections; its `fc` always has a bias.
        del settings["bias"]
        return settings | {"architectures": ["LlamaForCausalLMEagle"]}

    def export_files(self, layout: str) -> tuple[str, ...]:
        # The first version of the official code opens only torch's file.
        official = ("model.safetensors", "pytorch_model.bin")
        return official if layout == "official" else super().export_files(layout)

    def embedding(self, config: EagleConfig, layout: str) -> Embedding:
        del config
        return "required" if layout == "official" else "none"

    def lacks(
        self, directory: Path, settings: Mapping[str, Any], names: Sequence[str]
    ) -> list[str]:
        lacks = super().lacks(directory, settings, names)
        if EMBEDDING not in names:
            lacks.append(f"{EMBEDDING} (the target's is used)")
        if "draft_vocab_size" in settings:
            lacks += draft_vocabulary.lacks(settings, names)
        return lacks
