"""Reports the cost of a compiled program: memory, FLOPs, bytes moved, and collectives."""

from __future__ import annotations

import collections
import math
import re
from typing import Any

from eagle_jax import hardware

GIB = 2**30

# Operations that transfer data to or from the host.
_HOST = re.compile(
    r"\b(infeed|outfeed|send|recv)\(|custom_call_target=\"[^\"]*callback|MoveToHost|MoveToDevice"
)
_COLLECTIVE = re.compile(
    r"= (?P<result>.+?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|"
    r"collective-permute)(?:-start)?\("
)
# Operations that launch nothing on a GPU.
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all")
_ARRAY = re.compile(r"\b([a-z]+[0-9]+|pred)\[([0-9,]*)\]")


def describe(name: str, compiled: Any, seconds: float, kind: str) -> dict[str, Any]:
    """Returns one program's figures, per device.

    Returns:
        program: its name; arguments, temporaries, code and total in GiB, and total as a share of
        the device's memory; gflop and gbytes (moved) as the compiler counts them; the compiler's
        estimate in milliseconds; a lower bound in milliseconds (reading the arguments once, or the
        arithmetic, at the data sheet's rates; None for an unknown device); collectives by kind as
        (number, MiB of results); kernel launches (only for GPU programs without a loop); host:
        transfers to the host; compile: seconds. Collectives, launches and host are None if the
        program's text cannot be read.
    """
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    text = _text(compiled)
    arguments = memory.argument_size_in_bytes
    # Outputs that reuse the memory of a donated argument need no memory of their own.
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    total = arguments + new + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    estimate = cost.get("optimal_seconds", -1.0)
    counted = "flops" in cost  # XLA's GPU compiler does not count them
    gflop, chip = cost.get("flops", 0.0) / 1e9, hardware.find(kind)
    floor = None
    if chip is not None:
        arithmetic = 0.0 if chip.flops is None else gflop * 1e9 / chip.flops
        floor = 1e3 * max(arithmetic, arguments / chip.bandwidth)
    return {
        "program": name,
        "arguments": arguments / GIB,
        "temporaries": (memory.temp_size_in_bytes + new) / GIB,
        "code": memory.generated_code_size_in_bytes / GIB,
        "total": total / GIB,
        "share": None if chip is None else total / GIB / chip.memory,
        "gflop": gflop if counted else None,
        "gbytes": cost.get("bytes accessed", 0.0) / 1e9 if counted else None,
        "milliseconds": 1e3 * estimate if estimate > 0 else None,
        "floor": floor,
        "collectives": None if text is None else collectives(text),
        "launches": None if text is None or not kind.startswith("NVIDIA") else launches(text),
        "host": None
        if text is None
        else sorted({match.group(0).strip("(") for match in _HOST.finditer(text)}),
        "compile": seconds,
    }


def _text(compiled: Any) -> str | None:
    """Returns the program's text, or None if libtpu cannot print it (some large programs)."""
    import jax

    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError:
        return None


def collectives(text: str) -> dict[str, tuple[int, float]]:
    """Counts the collectives of a compiled program by kind: how many, and MiB of their results."""
    found: dict[str, list[float]] = collections.defaultdict(list)
    for match in _COLLECTIVE.finditer(text):
        found[match["kind"]].append(_bytes(match["result"]) / 2**20)
    return {kind: (len(sizes), sum(sizes)) for kind, sizes in sorted(found.items())}


def launches(text: str) -> int | None:
    """Counts the kernels and copies that a GPU program launches; None if it has a loop."""
    entry = text[text.rindex("\nENTRY ") :]
    kinds = re.findall(r"^\s+(?:ROOT )?%\S+ = .*? ([a-z][a-z-]*)\(", entry, re.MULTILINE)
    if "while" in kinds:
        return None
    return sum(kind not in _FREE and not kind.endswith("-done") for kind in kinds)


def _bytes(shapes: str) -> int:
    total = 0
    for dtype, sizes in _ARRAY.findall(shapes):
        bits = int(re.sub(r"[a-z]+", "", dtype) or 8)
        total += math.prod(int(n) for n in sizes.split(",") if n) * bits // 8
    return total
