"""The layout of parameters in memory for decoding: fewer, larger matrices (`config.fused`)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

# What `fused` joins: the first of them -> the name together, the others.
_JOINED = {
    "q_proj": ("qkv_proj", ("k_proj", "v_proj")),
    "gate_proj": ("gate_up_proj", ("up_proj",)),
}
_JOINED_BEFORE = re.compile(r".*\.(k|v|up)_proj\.(kernel|bias)")

# An expert's parameter: its list, its number, the rest.
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.*)")


def fused_parts(names: Iterable[str]) -> dict[str, list[tuple[str, ...]]]:
    """What `fused` makes of parameters: the name of each array in that layout -> its parts.

    The tuples are experts, by number, to be stacked (a list of one where there are no experts);
    the names in a tuple are matrices or biases to be put side by side.
    """
    numbered: dict[str, dict[int, tuple[str, ...]]] = {}
    for name in names:
        fused, joined = name, (name,)
        if _JOINED_BEFORE.fullmatch(name):
            continue
        for first, (together, others) in _JOINED.items():
            if f".{first}." in name:
                joined = (name, *(name.replace(first, other) for other in others))
                fused = name.replace(first, together)
        if expert := _EXPERT.fullmatch(fused):
            fused = f"{expert[1]}.{expert[3]}"
        numbered.setdefault(fused, {})[int(expert[2]) if expert else 0] = joined
    return {name: [parts[i] for i in sorted(parts)] for name, parts in numbered.items()}


def fuse(params: Mapping[str, np.ndarray], config: Any) -> dict[str, np.ndarray]:
    """Parameters for `fused`: q, k and v as [d, k, (g + 2) e], the queries of a key head before it;
    gate and up as [d, 2, f]; experts stacked. `config` has the size of a head, if there are any."""

    def join(names: tuple[str, ...]) -> np.ndarray:
        parts = [params[name] for name in names]
        if len(parts) == 3:
            heads = (*parts[1].shape[:-1], parts[1].shape[-1] // config.head_dim, -1)
            return np.concatenate([part.reshape(heads) for part in parts], axis=-1)
        return parts[0] if len(parts) == 1 else np.stack(parts, axis=1)

    return {
        name: np.stack([join(part) for part in parts]) if ".experts." in name else join(parts[0])
        for name, parts in fused_parts(params).items()
    }
