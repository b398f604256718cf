"""Converts parameters to a `Layout`: fewer, larger matrices than in files and in training."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from eagle_jax.layout import Layout

# Parameters that are fused, and the name of the fused parameter.
_GATE_UP = ("gate_proj", "up_proj"), "gate_up_proj"
_QKV = ("q_proj", "k_proj", "v_proj"), "qkv_proj"

# Matches the name of an expert's parameter: list of experts, number, rest.
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.*)")


def fused_parts(names: Iterable[str], layout: Layout) -> dict[str, list[tuple[str, ...]]]:
    """Maps the name of each array of a layout to the parameters that it is made of.

    Each tuple names matrices or biases that are concatenated. A list of several tuples holds the
    experts of a layer, by number, which are stacked.
    """
    chosen = (layout.gate_up_fused, _GATE_UP), (layout.qkv_fused, _QKV)
    groups = [group for fused, group in chosen if fused]
    numbered: dict[str, dict[int, tuple[str, ...]]] = {}
    for name in names:
        fused, joined = name, (name,)
        for parts, together in groups:
            for part in parts:
                if f".{part}." in name:
                    joined = tuple(name.replace(part, other) for other in parts)
                    fused = name.replace(part, together)
        expert = _EXPERT.fullmatch(fused) if layout.gate_up_fused else None
        if expert:
            fused = f"{expert[1]}.{expert[3]}"
        numbered.setdefault(fused, {})[int(expert[2]) if expert else 0] = joined
    return {name: [parts[i] for i in sorted(parts)] for name, parts in numbered.items()}


def fuse(params: Mapping[str, np.ndarray], config: Any, layout: Layout) -> dict[str, np.ndarray]:
    """Returns float parameters in the shapes of a layout.

    Args:
        params: all parameters of a model by name, or all parts of some arrays of the layout.
        config: configuration of the model; fusing q, k and v needs its `head_dim`.
        layout: with `gate_up_fused`, gate and up become [d, 2, f] and experts are stacked; with
            `qkv_fused`, q, k and v become [d, k (g + 2) e], where each key head has its g queries,
            its key and its value.
    """

    def join(names: tuple[str, ...]) -> np.ndarray:
        parts = [params[name] for name in names]
        if len(parts) == 3:
            lead = parts[1].shape[:-1]  # empty for biases
            heads = (*lead, parts[1].shape[-1] // config.head_dim, -1)
            joined = np.concatenate([part.reshape(heads) for part in parts], axis=-1)
            return joined.reshape(*lead, -1)
        return parts[0] if len(parts) == 1 else np.stack(parts, axis=1)

    return {
        name: np.stack([join(part) for part in parts])
        if layout.gate_up_fused and ".experts." in name
        else join(parts[0])
        for name, parts in fused_parts(params, layout).items()
    }
