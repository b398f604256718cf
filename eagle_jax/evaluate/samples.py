"""Stores the samples of a run: one JSON line per measurement, appended as it is made.

The first line holds the settings of all samples. A killed run resumes from this file; an
incomplete last line is removed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from eagle_jax import distributed, outputs

SAMPLES = "samples.jsonl"
WRITTEN = (
    SAMPLES,
    "results.json",
    "results.csv",
    "speedup.png",
    "acceptance.png",
    "step_time.png",
)
_START = b'{"eagle_jax_evaluation": '


class Samples:
    """Records by key, in memory and on disk; only the first process writes.

    Raises:
        ValueError: the directory holds samples of other settings, or an unrelated file.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], restart: bool = False) -> None:
        self.path = folder / SAMPLES
        self._records: dict[str, dict[str, Any]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        writes = distributed.first()
        if restart and writes:
            for name in WRITTEN:
                (folder / name).unlink(missing_ok=True)
        distributed.wait_for_all("restart")
        found = self._read(json.loads(json.dumps(settings)), writes)  # as JSON reads them back
        distributed.wait_for_all("samples")
        if not found and writes:
            header = json.dumps({"eagle_jax_evaluation": 1, "settings": settings})
            outputs.write_text(self.path, header + "\n")
        self._file = open(self.path if writes else os.devnull, "a", encoding="utf-8")

    def get(self, key: str) -> dict[str, Any] | None:
        """Returns the record stored under `key`, or None."""
        return self._records.get(key)

    def add(self, key: str, record: Mapping[str, Any]) -> dict[str, Any]:
        """Stores `record` at once and returns it as a later run will read it."""
        line = json.dumps({"key": key, **record})
        with outputs.naming(self.path):
            self._file.write(line + "\n")
            self._file.flush()
        self._records[key] = json.loads(line)
        return self._records[key]

    def close(self) -> None:
        with outputs.naming(self.path):
            self._file.close()

    def _read(self, settings: dict[str, Any], writes: bool) -> bool:
        """Reads the stored records; returns False if there are none."""
        data = self.path.read_bytes() if self.path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if not whole and (data.startswith(_START) or _START.startswith(data)):
            return False
        here = f"output_dir={str(self.path.parent)!r}"
        try:
            first, *lines = whole.splitlines()
            if not first.startswith(_START):
                raise ValueError
            found = json.loads(first)["settings"]
            records = [json.loads(line) for line in lines]
            if not isinstance(found, dict) or not all(map(_is_record, records)):
                raise ValueError
            self._records = {record["key"]: record for record in records}
        except (ValueError, LookupError, TypeError, RecursionError):
            raise ValueError(
                f"{here}: its {SAMPLES} is damaged or not ours; give another --output"
            ) from None
        _compare(found, settings, here)
        if writes and len(whole) < len(data):
            os.truncate(self.path, len(whole))
        return True


# Required fields of each kind of record, by type; the kind is the first word of a key.
_SECONDS = {"run": ("compile", "prefill", "decode"), "compile": ("seconds",)}
_COUNTS = {"run": ("new_tokens", "rounds")}
_SHARES = {"run": ("accepted",)}
_TOKENS = {"run": ("tokens",), "frozen": ("tokens",)}


def _is_record(record: Any) -> bool:
    """Returns whether a line is a valid record of a run, a frozen answer or a compilation."""
    kind = json.loads(record["key"])[0]

    def of(table: Mapping[str, tuple[str, ...]]) -> list[Any]:
        return [record[name] for name in table.get(kind, ())]

    return (
        kind in ("run", "frozen", "compile")
        and all(map(_is_number, of(_SECONDS)))
        and all(_are(_is_count, values) for values in of(_COUNTS))
        and all(_are(_is_number, values) for values in of(_SHARES))
        and all(_are(_is_count, row) for rows in of(_TOKENS) for row in rows)
    )


def _are(check: Callable[[Any], bool], values: Any) -> bool:
    return isinstance(values, list) and all(map(check, values))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _compare(found: dict[str, Any], settings: dict[str, Any], here: str) -> None:
    for name in {**settings, **found}:
        before, now = found.get(name), settings.get(name)
        if before != now:
            taken = f"{name} {before}, not {now}"
            if isinstance(before, dict) and isinstance(now, dict):
                changed = [k for k in {**now, **before} if before.get(k) != now.get(k)]
                taken = f"other {name} ({', '.join(changed)})"
            raise ValueError(
                f"{here}: holds samples taken with {taken}; give another --output, or --restart to "
                "delete them and measure anew"
            )
