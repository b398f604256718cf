"""Plots an evaluation: speedup by task, acceptance by depth, time of a pass by nodes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eagle_jax import outputs
from eagle_jax.evaluate.config import BASELINE

Row = dict[str, Any]


def plot(folder: Path, rows: Sequence[Row], steps: Sequence[Row], title: str) -> list[str]:
    """Writes the PNG files; returns their names.

    Args:
        rows: result of `metrics.Table.rows`.
        steps: result of `metrics.step_times`; may be empty.
        title: title of the plots: what was measured, and on which device.
    """
    import matplotlib

    matplotlib.use("Agg")

    rows = [row for row in rows if not row["category"]]
    written = ["speedup.png"]
    _speedup(folder / "speedup.png", rows, title)
    if any(row["accepted_per_depth"] for row in rows):
        _acceptance(folder / "acceptance.png", rows, title)
        written.append("acceptance.png")
    if steps:
        _step_time(folder / "step_time.png", steps, title)
        written.append("step_time.png")
    return written


def _panels(
    rows: Sequence[Row], key: str, size: tuple[float, float], title: str
) -> tuple[Any, list[Any]]:
    """Returns a figure with one panel of `size` per value of `key`, side by side."""
    from matplotlib.figure import Figure

    values = list(dict.fromkeys(row[key] for row in rows))
    figure = Figure(figsize=(size[0] * len(values), size[1]), layout="constrained")
    figure.suptitle(title, fontsize=9)
    axes = figure.subplots(1, len(values), squeeze=False, sharey=True)[0]
    return figure, list(zip(values, axes, strict=True))


def _speedup(image: Path, rows: Sequence[Row], title: str) -> None:
    """Plots a dot per method and task; the mark of all tasks together has its interval."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    names = list(dict.fromkeys(row["method"] for row in rows))
    methods = [
        name for name in names if name != BASELINE
    ] or names  # a vertical line marks the baseline
    figure, panels = _panels(rows, "temperature", (5.0, 0.26 * len(methods) + 1.8), title)
    for temperature, axes in panels:
        for index, task in enumerate(tasks):
            own = [
                row
                for row in rows
                if (row["task"], row["temperature"]) == (task, temperature)
                and row["method"] in methods
            ]
            places = [methods.index(row["method"]) for row in own]
            last = task == tasks[-1]
            color = "black" if last else f"C{index}"
            for place, row in zip(places, own, strict=True):
                if last and row["speedup_interval"]:
                    axes.plot(row["speedup_interval"], [place] * 2, color=color, linewidth=1.2)
            marker = {"marker": "D", "s": 34} if last else {"marker": "o", "s": 20}
            speedups = [row["speedup"] for row in own]
            axes.scatter(speedups, places, color=color, label=task, zorder=2 + last, **marker)
        axes.axvline(1.0, color="gray", linewidth=0.8)
        axes.set_yticks(range(len(methods)), methods)
        axes.set(title=f"temperature {temperature:g}", xlabel="decode speedup over vanilla")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
    panels[0][1].invert_yaxis()  # the first method on top; panels share the axis
    _legend(figure, panels, len(tasks))
    with outputs.naming(image):
        figure.savefig(image, dpi=120)


def _acceptance(image: Path, rows: Sequence[Row], title: str) -> None:
    """Plots acceptance by depth over all tasks."""
    last = rows[-1]["task"]  # the last rows are those of all tasks together
    rows = [row for row in rows if row["task"] == last]
    figure, panels = _panels(rows, "temperature", (6.0, 4.2), title)
    names = list(dict.fromkeys(row["method"] for row in rows if row["method"] != BASELINE))
    for temperature, axes in panels:
        for row in rows:
            shares = row["accepted_per_depth"]
            if row["temperature"] == temperature and shares:
                depths = range(1, len(shares) + 1)
                index = names.index(row["method"])
                line = {"color": f"C{index % 10}", "linestyle": "--" if index > 9 else "-"}
                axes.plot(depths, shares, marker="o", markersize=4, label=row["method"], **line)
        axes.set(title=f"temperature {temperature:g}, {last}", xlabel="depth", ylim=(0, 1))
        axes.set_ylabel("share of rounds that kept a token")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    _legend(figure, panels, len(names))
    with outputs.naming(image):
        figure.savefig(image, dpi=120)


def _legend(figure: Any, panels: list[Any], entries: int) -> None:
    handles, labels = panels[0][1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(entries, 5), fontsize=8)


def _step_time(image: Path, steps: Sequence[Row], title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.2), layout="constrained")
    figure.suptitle(title, fontsize=9)
    axes = figure.subplots()
    nodes = [row["nodes"] for row in steps]
    axes.plot(nodes, [row["ms"] for row in steps], "o-")
    axes.set_xscale("log", base=2)
    axes.set_xticks(nodes, [str(n) for n in nodes])
    axes.set(xlabel="tokens of one target pass", ylabel="ms", ylim=(0, None))
    axes.grid(alpha=0.3)
    with outputs.naming(image):
        figure.savefig(image, dpi=120)
