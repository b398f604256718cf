"""Writes the results of an evaluation: results.json, results.csv, and tables on the console."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from eagle_jax import outputs

Row = dict[str, Any]


def write(folder: Path, result: dict[str, Any]) -> None:
    """Writes results.json with everything, and results.csv with the rows (lists as JSON)."""
    text = json.dumps(result, indent=1)
    outputs.write_text(folder / "results.json", text + "\n")
    rows, table = result["rows"], folder / "results.csv"
    with outputs.naming(table), table.open("w", newline="", encoding="utf-8") as file:
        out = csv.DictWriter(file, list(rows[0]))
        out.writeheader()
        for row in rows:
            out.writerow({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()})


def tables(result: dict[str, Any]) -> Iterator[str]:
    """Yields the lines of the tables for the console."""
    rows = result["rows"]
    whole = [row for row in rows if not row["category"]]
    width = max(len(row["method"]) for row in rows)
    for group in _groups(whole, ("task", "temperature")):
        first = group[0]
        yield ""
        yield f"{first['task']}, temperature {first['temperature']:g}: {first['answers']} answers"
        yield (
            f"{'method':{width}}   tau nodes round ms  cost tokens/s speedup   95 % interval"
            "  in all    MBU   equal"
        )
        for row in group:
            yield f"{row['method']:{width}} {_figures(row)}"
            if result["config"]["methods"][row["method"]] == repr("auto"):
                yield f"{'':{width}} auto is {row['settings']}"
    yield from _acceptance(whole, width)
    yield from _categories([row for row in rows if row["category"]], width)
    if result["step_times"]:
        yield ""
        yield "time of a target pass: nodes, ms"
        yield "  ".join(f"{row['nodes']}: {row['ms']:.3g}" for row in result["step_times"])
    yield ""
    for task, counts in result["skipped"].items():
        if any(counts.values()):
            said = ", ".join(f"{n} at temperature {t}" for t, n in counts.items())
            yield f"skipped as too long, {task}: {said}"
    yield from _differences(whole, result["lossless"])


def _figures(row: Row) -> str:
    low, high = row["speedup_interval"] or (None, None)
    between = f"{low:.2f} to {high:.2f}" if low is not None else "-"
    mbu = "-" if row["mbu"] is None else f"{100 * row['mbu']:.1f}%"
    equal = f"{row['equal']}/{row['answers']}"
    mark = "" if row["guarantee"] == "exact" else f" {row['guarantee']}"
    return (
        f"{row['tau']:5.2f} {row['nodes']:5d} {row['round_ms']:8.3f} {row['round_cost']:5.2f}"
        f" {row['tokens_per_second']:8.1f} {row['speedup']:6.2f}x {between:>15}"
        f" {row['end_to_end']:6.2f}x {mbu:>6} {equal:>7}{mark}"
    )


def _acceptance(rows: Sequence[Row], width: int) -> Iterator[str]:
    """Yields the acceptance table of the last group of rows: all tasks together."""
    last = rows[-1]["task"]
    yield ""
    yield f"{last}: share of rounds that kept a token of depth 1, 2, ...; kept / drafted tokens"
    for row in rows:
        if row["task"] == last and row["accepted_per_depth"]:
            shares = " ".join(f"{share:.2f}" for share in row["accepted_per_depth"])
            kept = row["accepted_per_drafted"]
            yield (
                f"{row['method']:{width}} T={row['temperature']:<4g} {shares}"
                + ("" if kept is None else f"; {kept:.3f}")
            )


def _categories(rows: Sequence[Row], width: int) -> Iterator[str]:
    for group in _groups(rows, ("task", "temperature")):
        yield ""
        first = group[0]
        yield f"{first['task']} by category, temperature {first['temperature']:g}: tau, speedup"
        for one in _groups(group, ("method",)):
            parts = [f"{r['category']} {r['tau']:.2f} {r['speedup']:.2f}x" for r in one]
            for start in range(0, len(parts), 4):
                name = one[0]["method"] if start == 0 else ""
                yield f"{name:{width}} {'; '.join(parts[start : start + 4])}"


def _differences(rows: Sequence[Row], lossless: bool | None) -> Iterator[str]:
    for row in rows:
        if row["equal"] < row["answers"] and row["task"] != "all tasks":
            differing = row["answers"] - row["equal"]
            yield (
                f"{row['method']}, {row['task']}, temperature {row['temperature']:g} "
                f"({row['guarantee']}): {differing} of {row['answers']} answers "
                f"differ from vanilla's, first at token {row['first_difference_min']} "
                f"(median {row['first_difference_median']:g})"
            )
    if lossless is False:
        yield "NOT LOSSLESS: answers that must equal vanilla's differ"


def _groups(rows: Sequence[Row], keys: tuple[str, ...]) -> Iterator[list[Row]]:
    """Groups the rows that agree in `keys`, in order of first appearance."""
    out: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        out.setdefault(tuple(row[key] for key in keys), []).append(row)
    yield from out.values()
