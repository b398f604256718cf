"""Files of EAGLE-3 heads, as the authors publish them and as serving stacks read them.

Serving stacks number the fused layers (`AUX`) differently: vLLM and this library use the layers
that the residual streams enter, and SGLang the layers that they leave. The authors' files have no
numbers: their code fuses `official_layers` of the target that it runs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eagle_jax.checkpoint import config_json, files
from eagle_jax.checkpoint.files import Arrays, LazyTensors
from eagle_jax.config import TransformerConfig
from eagle_jax.drafters import draft_vocabulary
from eagle_jax.drafters.eagle3.config import Eagle3Config
from eagle_jax.drafters.files import EMBEDDING, NATIVE, Embedding, ExportTarget
from eagle_jax.drafters.one_layer import OneLayerFiles

AUX = "eagle_aux_hidden_state_layer_ids"
"""Key, in `config.json`, of the layers whose residual streams are fused."""

# vLLM's names for the tables.
_ALIASES = {"draft_id_to_target_id": "d2t"}

_FUSED = 3  # number of layers that official heads fuse

# Number of tokens that vLLM drafts by default.
_SPECULATIVE_TOKENS = 5


class Eagle3Files(OneLayerFiles):
    """Files of EAGLE-3 heads."""

    layouts = ("official", "sglang", "speculators")
    layer = "midlayer."

    def recognises(self, settings: Mapping[str, Any], names: Sequence[str]) -> bool:
        if any(
            name.startswith(self.layer) or name.endswith("hidden_norm.weight") for name in names
        ):
            return True
        tables = any(name in ("d2t", "t2d") for name in names)
        if "draft_vocab_size" not in settings and not tables:
            return False
        # EAGLE-1 has no head of its own, also with a draft vocabulary.
        eagle = any(name.startswith(("fc.", "layers.0.")) for name in names)
        return not eagle or any(name.endswith("lm_head.weight") for name in names)

    def settings(
        self, config: Eagle3Config, dtype: str, coverage: float | None = None
    ) -> dict[str, Any]:
        settings = super().settings(config, dtype, coverage) | {
            "architectures": ["LlamaForCausalLMEagle3"],
            AUX: list(config.aux_layers),
            "fc_norm": config.fc_norm,
            "norm_output": config.norm_output,
        }
        # If this key is present, the official code takes the embedding from the draft's file, and
        # leaves it random if the file has none.
        if config.target_hidden_size is not None:
            settings["target_hidden_size"] = config.target_hidden_size
        return settings

    def tables(self, config: Eagle3Config, params: Mapping[str, Any]) -> Arrays:
        """Returns `d2t`, and `t2d`, which marks the target's tokens that have an entry."""
        result = super().tables(config, params)
        tokens = np.arange(config.draft_vocab_size) + result["d2t"]
        return result | {"t2d": np.isin(np.arange(config.vocab_size), tokens)}

    def read(
        self,
        directory: Path,
        settings: Mapping[str, Any],
        tensors: LazyTensors,
        target: TransformerConfig | None,
    ) -> tuple[Eagle3Config, LazyTensors]:
        """Reads a draft as `DraftFiles.read` does; ignores an embedding as wide as the target's.

        Such an embedding is a copy of the target's.
        """
        path = directory / "config.json"
        tensors = {_official(name): array for name, array in tensors.items()}
        settings = self.biases(settings, tensors)
        fixed = ("norm_before_residual", "norm_before_fc", "tie_word_embeddings")
        config_json.check_fixed(path, settings, dict.fromkeys(fixed, False))
        head = tensors.get("lm_head.weight")
        if "d2t" not in tensors and head is not None:
            if head.shape[0] == settings.get("vocab_size"):
                settings = {"draft_vocab_size": head.shape[0], **settings}
        width = settings.get("target_hidden_size")
        own = {
            "aux_layers": _aux_layers(path, settings, target),
            "fc_norm": settings.get("fc_norm", "fc_norm.0.weight" in tensors),
            "target_hidden_size": None if width == settings.get("hidden_size") else width,
        }
        config = config_json.draft_from_json(directory, Eagle3Config, {**settings, **own})
        found = draft_vocabulary.pop_tables(tensors)
        copies = (EMBEDDING,) if self.shares_embedding(config) else ()
        params = files.arrays(directory, config, tensors, *copies)
        params["d2t"] = draft_vocabulary.checked_offsets(directory, config, *found)
        return config, params

    def sizes(self, config: Eagle3Config) -> dict[str, int]:
        return {"hidden_size": config.feature_size, "vocab_size": config.vocab_size}

    def shares_embedding(self, config: Eagle3Config) -> bool:
        return config.target_hidden_size is None

    def as_layout(
        self, config: Eagle3Config, params: Mapping[str, Any], layout: str
    ) -> tuple[Eagle3Config, Mapping[str, Any]]:
        if layout == "sglang" and config.target_hidden_size:
            raise ValueError(
                f"target_hidden_size={config.target_hidden_size}: sglang gives every draft the "
                "target's embedding, and this one has its own; use 'official' or 'speculators'"
            )
        return config, params

    def export_settings(
        self, config: Eagle3Config, layout: str, dtype: str, target: ExportTarget | None
    ) -> dict[str, Any]:
        settings = super().export_settings(config, layout, dtype, target)
        # vLLM takes a missing key as true.
        settings["norm_before_residual"] = False
        if layout in ("official", NATIVE):
            return settings
        if layout == "sglang":
            left = [layer - 1 for layer in settings.pop(AUX)]
            nested = {"use_aux_hidden_state": True, AUX: left}
            return settings | {"eagle_config": nested, "target_hidden_size": config.feature_size}
        return _speculators(config, settings, target)

    def export_tensors(
        self, config: Eagle3Config, params: Mapping[str, Any], layout: str, dtype: str
    ) -> dict[str, Any]:
        tensors = super().export_tensors(config, params, layout, dtype)
        if layout == "speculators":
            tensors = {name.replace(self.layer, "layers.0."): x for name, x in tensors.items()}
        return tensors

    def embedding(self, config: Eagle3Config, layout: str) -> Embedding:
        if config.target_hidden_size or layout in ("sglang", NATIVE):
            return "none"
        return "kept" if layout == "official" else "written"

    def unsaid(self, config: Eagle3Config, target: TransformerConfig | None) -> list[str]:
        found = super().unsaid(config, target)
        found += [f"{name}=True" for name in ("fc_norm", "norm_output") if getattr(config, name)]
        if config.attention_bias:
            found.append("qkv_bias=True")
        layers = () if target is None else official_layers(target)
        if target is not None and config.aux_layers != layers:
            few = "" if len(layers) == _FUSED else f", and stops, since its heads read {_FUSED}"
            found.append(f"layers {config.aux_layers} (it fuses {layers}{few})")
        return found

    def describe(self, config: Eagle3Config, settings: Mapping[str, Any]) -> dict[str, Any]:
        return super().describe(config, settings) | {"fused layers": list(config.aux_layers)}

    def lacks(
        self, directory: Path, settings: Mapping[str, Any], names: Sequence[str]
    ) -> list[str]:
        lacks = super().lacks(directory, settings, names)
        lacks += draft_vocabulary.lacks(settings, names)
        if "t2d" not in {name.removeprefix("model.") for name in names}:
            lacks.append("t2d (follows from d2t)")
        nested = settings.get("eagle_config")
        if AUX not in settings and not (isinstance(nested, dict) and AUX in nested):
            lacks.append(f"{AUX} (follows from the target)")
        return lacks


def official_layers(target: TransformerConfig) -> tuple[int, ...]:
    """Returns the layers that official EAGLE-3 heads fuse, by the layer that the streams enter.

    The official code goes through the target's L layers and keeps the streams that enter layers 2,
    L // 2 and L - 3, each once, in ascending order. If L < 7, some coincide or do not exist.
    """
    layers = target.num_hidden_layers
    return tuple(sorted({2, layers // 2, layers - 3} & set(range(layers))))


def _official(name: str) -> str:
    """Returns the official name of a tensor, given that name or the one of a serving stack."""
    name = name.removeprefix("model.")
    return re.sub(r"^layers\.0\.", "midlayer.", _ALIASES.get(name, name))


def _aux_layers(
    path: Path, settings: Mapping[str, Any], target: TransformerConfig | None
) -> tuple[int, ...]:
    """Returns the fused layers, by the layer that their residual streams enter."""
    nested = settings.get("eagle_config")
    nested = nested.get(AUX) if isinstance(nested, dict) else None
    # The top-level key has vLLM's numbers (the layers that streams enter). `eagle_config` has
    # SGLang's numbers (the layers that streams leave).
    ids, shift = (settings[AUX], 0) if AUX in settings else (nested, 1)
    if ids:
        if not isinstance(ids, list) or any(type(index) is not int for index in ids):
            raise ValueError(f"{path}: {AUX}={ids!r}: must be a list of layer numbers")
        return tuple(index + shift for index in ids)
    if target is None:
        raise ValueError(
            f"{path}: has no {AUX}, and the official layers depend on the target; "
            "add the key, or open the draft together with its target (--target; or load(TARGET, "
            "draft=...))"
        )
    layers = official_layers(target)
    if len(layers) != _FUSED:
        raise ValueError(
            f"{path}: has no {AUX}, and of a target with {target.num_hidden_layers} layers the "
            f"official code fuses {layers}, where a head reads {_FUSED}; add the key"
        )
    return layers


def _speculators(
    config: Eagle3Config, settings: dict[str, Any], target: ExportTarget | None
) -> dict[str, Any]:
    own = ("draft_vocab_size", AUX, "fc_norm", "norm_output", "norm_before_residual")
    own += ("dtype", "torch_dtype")
    layer = {key: value for key, value in settings.items() if key not in own}
    layer.pop("target_hidden_size", None)
    del layer["qkv_bias"]
    method = {"proposal_type": "greedy", "speculative_tokens": _SPECULATIVE_TOKENS}
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        **{key: settings[key] for key in own},
        "target_hidden_size": config.feature_size,
        "norm_before_fc": False,
        "tie_word_embeddings": False,
        "transformer_layer_config": layer | {"attention_bias": config.attention_bias},
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [method],
            "verifier": {
                "name_or_path": target.name if target else "",
                "architectures": list(target.architectures) if target else [],
            },
        },
    }
