"""Drafts in the layouts of those who run them: the official code, SGLang, speculators and vLLM.

| layout | EAGLE-1 | EAGLE-3 | Medusa |
|---|---|---|---|
| official | yes | yes | yes |
| sglang | `LlamaForCausalLMEagle` | `LlamaForCausalLMEagle3` | |
| speculators | | `Eagle3Speculator`, as vLLM reads it | |

None of them has a draft vocabulary for EAGLE-1 (SGLang takes one from a file of its own,
`--speculative-token-map`). There the head is written without it: the same weights, which then
draft from all tokens and cost more. `INNER` keeps it.

A wrong word in such a file lowers acceptance and nothing else tells. So whatever follows from a
default elsewhere is written out, and what was written is read again and compared, bit by bit,
before it counts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from eagle_jax.checkpoint import drafts, files, hf, safetensors
from eagle_jax.checkpoint.lazy_tensor import LazyTensor, cast, lazily
from eagle_jax.config import DraftConfig, Eagle3Config, EagleConfig, MedusaConfig, TransformerConfig

LAYOUTS = ("official", "sglang", "speculators")
INNER = "native"
"""The layout of drafts beside their target: the official one, for no reader but this library."""

# How many tokens vLLM drafts ahead unless told otherwise.
_SPECULATIVE_TOKENS = 5


@runtime_checkable
class Bar(Protocol):
    """A progress bar; tqdm's are."""

    def update(self, count: int, /) -> object: ...


class NoBar:
    """A progress bar that shows nothing."""

    def __enter__(self) -> NoBar:
        return self

    def __exit__(self, *unused: object) -> None:
        pass

    def update(self, count: int) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class Target:
    """What an export says about the draft's target, as far as it is known.

    Attributes:
        config: of the target.
        embedding: its embedding matrix [v, d], which the official EAGLE-1 loader and speculators
            want beside the draft's own tensors.
        name: the name or the path under which a serving stack finds it.
        architectures: as in its `config.json`.
    """

    config: TransformerConfig
    embedding: LazyTensor
    name: str = ""
    architectures: Sequence[str] = ()


def write(
    directory: Path,
    config: DraftConfig,
    params: Mapping[str, Any],
    layout: str,
    dtype: str | None,
    *,
    target: Target | None = None,
    extra: Mapping[str, Any] | None = None,
    embedding: LazyTensor | None = None,
    bar: Callable[[int], AbstractContextManager[Bar]] = lambda total: NoBar(),
) -> None:
    """Writes a draft, reads it again and compares.

    Args:
        directory: must exist; what fails leaves files there, so give one of `files.staged`.
        config: of the draft.
        params: its arrays by their Flax names, as `hf.open_draft` gives them.
        layout: one of `LAYOUTS`, or `INNER`.
        dtype: of the weights on disk; None: one that holds all of them as they are.
        target: what the draft was trained for.
        extra: further keys of `config.json`, which give way to those that the layout has.
        embedding: the target's matrix [v, d], to write beside the weights of a draft that has
            none, for the layouts that have one.
        bar: makes a progress bar, given the number of bytes that are written and compared.

    Raises:
        ValueError: `params` don't match `config`, the layout cannot say what this draft computes,
            or what was written reads as something else.
        OSError: the directory cannot be written.
    """
    exact = dtype is None
    dtype = dtype or _exact_dtype(params)
    files.check_params(config, params, dtype)
    config, params = _as_layout(config, params, layout)
    settings = {**(extra or {}), **_settings(config, layout, dtype, target)}
    if getattr(config, "draft_vocab_size", None) is None:
        settings.pop(drafts.COVERAGE, None)  # of a draft vocabulary that the layout has not
    tensors = _tensors(config, params, layout, dtype)
    beside: dict[str, LazyTensor] = {}
    has_own = isinstance(config, Eagle3Config) and config.target_hidden_size is not None
    takes_one = layout != "sglang" and not isinstance(config, MedusaConfig) and not has_own
    if embedding is not None and takes_one:
        beside[drafts.EMBEDDING] = embedding if exact else cast(drafts.EMBEDDING, embedding, dtype)
    tensors |= beside
    expected = {name: lazily(array) for name, array in params.items()}
    if not exact:
        expected = {name: _cast(array, dtype) for name, array in expected.items()}
    path = directory / _file(config, layout)
    with bar(size(tensors) + size(expected) + size(beside)) as progress:
        safetensors.write(path, tensors, {"format": "pt"}, progress.update)
        files.write_json(directory / "config.json", settings)
        found, again = hf.open_draft(directory, target.config if target else None)
        if found != config:
            raise ValueError(f"{directory}: reads as {found}, not as {config}; please report this")
        if exact:  # the source's numbers come back, whatever dtype they took on the way
            again = {
                n: x.astype(expected[n].dtype if n in expected else x.dtype)
                for n, x in again.items()
            }
        compare(directory, again, expected, progress)
        stored = safetensors.stored(path)
        compare(directory, {name: stored[name] for name in beside}, beside, progress)


def compare(
    directory: Path,
    found: Mapping[str, LazyTensor],
    expected: Mapping[str, LazyTensor],
    progress: Bar,
) -> None:
    """Raises ValueError unless both have the same names, dtypes and bits; one tensor at a time."""
    if found.keys() != expected.keys():
        names = sorted(found.keys() ^ expected.keys())
        raise ValueError(f"{directory}: {names[0]} got lost or was added; please report this")
    for name, array in expected.items():
        old, new = np.asarray(array), np.asarray(found[name])
        if old.dtype != new.dtype or old.shape != new.shape or not _same(old, new):
            raise ValueError(f"{directory}: {name} reads otherwise than written; try another disk")
        progress.update(new.nbytes)


def size(arrays: Mapping[str, Any]) -> int:
    """Bytes that these arrays take."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays.values())


def _same(one: np.ndarray, two: np.ndarray) -> bool:
    one, two = (np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (one, two))
    return np.array_equal(one, two)


def unsaid(config: DraftConfig, target: TransformerConfig | None) -> list[str]:
    """What the code of the draft's authors passes over, or does not open, in their own layout."""
    if isinstance(config, MedusaConfig):
        return ["tie_lm_head=True"] if config.tie_lm_head else []
    if isinstance(config, TransformerConfig):
        return []
    found = []
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        found.append(f"head_dim={config.head_dim}")
    if config.rope_scaling is not None and config.rope_scaling.rope_type != "linear":
        found.append(f"rope_scaling {config.rope_scaling.rope_type!r}")
    if isinstance(config, EagleConfig):
        return found
    found += [f"{name}=True" for name in ("fc_norm", "norm_output") if getattr(config, name)]
    if config.attention_bias:
        found.append("qkv_bias=True")
    layers = () if target is None else drafts.official_layers(target)
    if target is not None and config.aux_layers != layers:
        found.append(f"layers {config.aux_layers} (it fuses {layers})")
    return found


def _exact_dtype(params: Mapping[str, Any]) -> str:
    """The dtype that holds all weights as they are."""
    names = {x.dtype.name for x in params.values() if x.dtype.kind not in "iub"}
    if not names <= set(files.DTYPES):
        raise ValueError(
            f"weights are {', '.join(sorted(names))}; give --dtype, one of "
            f"{', '.join(files.DTYPES)}"
        )
    return names.pop() if len(names) == 1 else "float32"  # neither of bfloat16 and float16 does


def _file(config: DraftConfig, layout: str) -> str:
    """The name that the authors' loaders look for."""
    medusa = isinstance(config, MedusaConfig) and layout == "official"
    return "medusa_lm_head.safetensors" if medusa else "model.safetensors"


def _cast(array: Any, dtype: str) -> LazyTensor:
    array = lazily(array)
    return array if array.dtype.kind in "iub" else array.astype(dtype)


def _as_layout(
    config: DraftConfig, params: Mapping[str, Any], layout: str
) -> tuple[DraftConfig, Mapping[str, Any]]:
    """The same draft as the layout can say it.

    Raises:
        ValueError: it cannot.
    """
    if layout not in (*LAYOUTS, INNER):
        raise ValueError(f"layout={layout!r}: must be one of {', '.join(LAYOUTS)}")
    if isinstance(config, TransformerConfig):
        raise ValueError("draft: is a model of its own; write it in format 'hf'")
    known = {"sglang": ("eagle", "eagle3")}
    known |= dict.fromkeys(("official", INNER), ("eagle", "eagle3", "medusa"))
    kinds = known.get(layout, ("eagle3",))
    if config.kind not in kinds:
        raise ValueError(
            f"draft: kind {config.kind!r} has no layout in {layout}, which knows "
            f"{', '.join(kinds)}; use 'official'"
        )
    if layout == "sglang" and isinstance(config, Eagle3Config) and config.target_hidden_size:
        raise ValueError(
            f"target_hidden_size={config.target_hidden_size}: sglang gives every draft the "
            "target's embedding, and this one has its own; use 'official' or 'speculators'"
        )
    if layout != INNER and isinstance(config, EagleConfig) and config.draft_vocab_size is not None:
        config = dataclasses.replace(config, draft_vocab_size=None)
        params = {name: array for name, array in params.items() if name != "d2t"}
    if layout == "sglang" and isinstance(config, EagleConfig) and not config.bias:
        # SGLang always makes one, and leaves it random where the file has none.
        bias = np.zeros(config.hidden_size, lazily(params["fc.kernel"]).dtype)
        return dataclasses.replace(config, bias=True), {**params, "fc.bias": bias}
    return config, params


def _settings(
    config: DraftConfig, layout: str, dtype: str, target: Target | None
) -> dict[str, Any]:
    """`config.json`."""
    if isinstance(config, MedusaConfig):
        return drafts.medusa_json(config, dtype)
    if isinstance(config, EagleConfig):
        settings = drafts.eagle_json(config, dtype, None)
    else:
        assert isinstance(config, Eagle3Config)
        settings = drafts.eagle3_json(config, dtype, None)
        # What is not said is taken as true by vLLM.
        settings["norm_before_residual"] = False
    if target is not None:
        # Without it, serving stacks would cut positions at transformers' default of 2048.
        settings["max_position_embeddings"] = target.config.max_position_embeddings
    if layout in ("official", INNER):
        return settings
    if config.attention_bias:
        settings["attention_bias"] = True
    if layout == "sglang":
        return _sglang(config, settings)
    return _speculators(config, settings, target)


def _sglang(config: EagleConfig | Eagle3Config, settings: dict[str, Any]) -> dict[str, Any]:
    if isinstance(config, EagleConfig):
        # There `bias` means one on the projections of attention; `fc` has one always.
        del settings["bias"]
        return settings | {"architectures": ["LlamaForCausalLMEagle"]}
    # It counts the layers left, others those entered.
    left = [layer - 1 for layer in settings.pop(drafts.AUX)]
    nested = {"use_aux_hidden_state": True, drafts.AUX: left}
    return settings | {"architectures": ["LlamaForCausalLMEagle3"], "eagle_config": nested}


def _speculators(
    config: EagleConfig | Eagle3Config, settings: dict[str, Any], target: Target | None
) -> dict[str, Any]:
    assert isinstance(config, Eagle3Config)
    own = ("draft_vocab_size", drafts.AUX, "fc_norm", "norm_output", "norm_before_residual")
    own += ("target_hidden_size", "dtype", "torch_dtype")
    layer = {key: value for key, value in settings.items() if key not in own}
    del layer["qkv_bias"]
    method = {"proposal_type": "greedy", "speculative_tokens": _SPECULATIVE_TOKENS}
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        **{key: settings[key] for key in own},
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


def _tensors(
    config: DraftConfig, params: Mapping[str, Any], layout: str, dtype: str
) -> dict[str, Any]:
    """By their names on disk, tables included."""
    tensors = {**files.disk_tensors(config, params, dtype), **drafts.tables(config, params)}
    if layout in ("sglang", "speculators") and isinstance(config, EagleConfig | Eagle3Config):
        prefix = "midlayer." if isinstance(config, Eagle3Config) else "layers.0."
        if config.attention_bias:
            # Their attention has a bias on every projection, or on none.
            zeros = np.zeros(config.hidden_size, dtype)
            tensors[f"{prefix}self_attn.o_proj.bias"] = zeros
    if layout == "speculators":
        tensors = {name.replace("midlayer.", "layers.0."): x for name, x in tensors.items()}
    return tensors
