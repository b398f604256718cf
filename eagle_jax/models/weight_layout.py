"""The layout of parameters in memory for decoding: fewer, larger matrices (`config.fused`)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

# What is put side by side, and the name together.
_GATE_UP = ("gate_proj", "up_proj"), "gate_up_proj"
_QKV = ("q_proj", "k_proj", "v_proj"), "qkv_proj"

# An expert's parameter: its list, its number, the rest.
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.*)")


def fused_parts(names: Iterable[str], config: Any) -> dict[str, list[tuple[str, ...]]]:
    """What `fused` makes of parameters: the name of each array in that layout -> its parts.

    The tuples are experts, by number, to be stacked (a list of one where there are no experts);
    the names in a tuple are matrices or biases to be put side by side: those of q, k and v only
    where `config.fused_qkv` says so.
    """
    qkv = getattr(config, "fused_qkv", False)  # Medusa's heads have no such field
    groups = (_GATE_UP, _QKV) if qkv else (_GATE_UP,)
    numbered: dict[str, dict[int, tuple[str, ...]]] = {}
    for name in names:
        fused, joined = name, (name,)
        for parts, together in groups:
            for part in parts:
                if f".{part}." in name:
                    joined = tuple(name.replace(part, other) for other in parts)
                    fused = name.replace(part, together)
        expert = _EXPERT.fullmatch(fused)
        if expert:
            fused = f"{expert[1]}.{expert[3]}"
        numbered.setdefault(fused, {})[int(expert[2]) if expert else 0] = joined
    return {name: [parts[i] for i in sorted(parts)] for name, parts in numbered.items()}


def fuse(params: Mapping[str, np.ndarray], config: Any) -> dict[str, np.ndarray]:
    """Parameters for `fused`: gate and up as [d, 2, f], experts stacked.

    For `fused_qkv` also q, k and v as [d, k (g + 2) e]: the queries of a key head, it, its value.
    """

    def join(names: tuple[str, ...]) -> np.ndarray:
        parts = [params[name] for name in names]
        if len(parts) == 3:
            lead = parts[1].shape[:-1]  # none for biases
            heads = (*lead, parts[1].shape[-1] // config.head_dim, -1)
            joined = np.concatenate([part.reshape(heads) for part in parts], axis=-1)
            return joined.reshape(*lead, -1)
        return parts[0] if len(parts) == 1 else np.stack(parts, axis=1)

    return {
        name: np.stack([join(part) for part in parts]) if ".experts." in name else join(parts[0])
        for name, parts in fused_parts(params, config).items()
    }
