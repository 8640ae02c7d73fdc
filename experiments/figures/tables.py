"""Tables 1 and 2: ours beside the paper's, as CSV, Markdown and a drawing."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.correlation.printed import BY_ACTIVATION, EXACT_CURVATURE
from experiments.correlation.rows import Row, column, learned, one_family, split
from experiments.figures.curves import bar, footer, images, papers_setting, robust_name
from experiments.figures.style import COLOURS, PAPER, canvas, label
from experiments.sweep.export import SweepResults
from hessdiag.store.files import replace_file


def mean_and_spread(values: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[float, float]:
    """Mean over seeds, and the standard deviation of one of them (NaN for a single seed)."""
    values = values[np.isfinite(values)]
    if not len(values):
        return math.nan, math.nan
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else math.nan


def shown(mean: float, spread: float, digits: int = 2) -> str:
    """12.34 ± 0.56"""
    if not math.isfinite(mean):
        return "-"
    return f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if math.isfinite(spread) else "")


def number(value: float | None, digits: int = 2) -> str:
    """A printed cell; a dash where the paper has none."""
    return "-" if value is None else "∞" if math.isinf(value) else f"{value:.{digits}f}"


def table1(results: SweepResults, chosen: Sequence[Row], path: Path) -> None:
    """Clean and robust accuracy and max|σ''| of every activation."""
    one_family(chosen, "table1")
    name = robust_name(chosen)
    robust = "AA" if name == "aa" else "AA-2"
    head = ["activation", "clean, %", f"{robust}, %", "max|σ''|", "paper: clean", "paper: AA", "paper: max|σ''|"]
    lines, marks = [], []
    for (activation,), members in split(chosen, "activation").items():
        cell = BY_ACTIVATION.get(activation)
        clean = mean_and_spread(100 * column(members, "clean"))
        hard = mean_and_spread(100 * column(members, name))
        note = f" (is {EXACT_CURVATURE[activation]})" if activation in EXACT_CURVATURE else ""
        printed = ["-", "-", "-"] if cell is None else [
            number(cell.standard), number(cell.robust), (number(cell.curvature, 3) if cell.curvature else "-") + note,
        ]  # fmt: skip
        title = activation if cell is None else cell.name
        lines.append([title, shown(*clean), shown(*hard), number(members[0].curvature, 3), *printed])
        star = cell.robust if cell is not None and papers_setting(chosen) else None
        marks.append((title, *bar(learned(members), name, 100.0), star))
    _write(path, head, lines, footer(results, chosen))
    _dots(path, marks, f"robust accuracy ({robust}), %", footer(results, chosen, name) + images(chosen, name))


def table2(results: SweepResults, chosen: Sequence[Row], path: Path) -> None:
    """Time and memory of every activation, absolute and relative to ReLU's."""
    one_family(chosen, "table2")
    base = {name: _base(chosen, name) for name in ("train_seconds", "saved_bytes", "peak_memory")}
    relu = BY_ACTIVATION["relu"]
    head = ["activation", "training, s", "time / ReLU's", "kept for backward / ReLU's", "peak GB", "peak / ReLU's"]
    head += ["paper: minutes", "paper: time / ReLU's", "paper: GB", "paper: memory / ReLU's"]
    lines, marks = [], []
    for (activation,), members in split(chosen, "activation").items():
        cell = BY_ACTIVATION.get(activation)
        seconds = column(members, "train_seconds")
        time = mean_and_spread(seconds / base["train_seconds"])
        kept = mean_and_spread(column(members, "saved_bytes") / base["saved_bytes"])
        peak = mean_and_spread(column(members, "peak_memory"))
        relative = mean_and_spread(column(members, "peak_memory") / base["peak_memory"])
        printed = ["-"] * 4
        if cell is not None:
            printed = [
                number(cell.minutes),
                number(cell.minutes / relu.minutes),
                number(cell.memory),
                number(cell.memory / relu.memory),
            ]
        title = activation if cell is None else cell.name
        ours = [shown(*mean_and_spread(seconds)), shown(*time), shown(*kept), shown(*peak), shown(*relative)]
        lines.append([title, *ours, *printed])
        star = cell.minutes / relu.minutes if cell is not None and papers_setting(chosen) else None
        reach = time[1] if math.isfinite(time[1]) else 0.0
        marks.append((title, time[0], reach, reach, star))
    _write(path, head, lines, footer(results, chosen))
    _dots(path, marks, "training time relative to ReLU's", footer(results, chosen, "train_seconds"))


def _base(chosen: Sequence[Row], name: str) -> float:
    values = column([row for row in chosen if row.activation == "relu"], name)
    return float(np.nanmean(values)) if np.isfinite(values).any() else math.nan


def _write(path: Path, head: list[str], lines: list[list[str]], note: str) -> None:
    write_csv(path, head, lines)
    write_markdown(path, head, lines, note)


def write_csv(path: Path, head: list[str], lines: list[list[str]]) -> None:
    """`path`.csv"""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([head, *lines])
    replace_file(path.with_suffix(".csv"), buffer.getvalue().encode())


def write_markdown(path: Path, head: list[str], lines: list[list[str]], note: str) -> None:
    """`path`.md: a table, and a note below it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (head, *lines)]
    rows.insert(1, "|" + " --- |" * len(head))
    replace_file(path.with_suffix(".md"), ("\n".join(rows) + f"\n\n{note}\n").encode())


def _dots(path: Path, marks: list[tuple[str, float, float, float, float | None]], what: str, note: str) -> None:
    with canvas(path, width=5.2, height=0.28 * len(marks) + 1.1) as axes:
        axis = axes[0][0]
        ours, theirs = "ours", "paper"  # each is named once, by the first that is drawn
        for height, (_, mean, down, up, printed) in enumerate(reversed(marks)):
            if math.isfinite(mean):
                reach = [[down], [up]] if down or up else None
                axis.errorbar(mean, height, xerr=reach, fmt="o", color=COLOURS[0], capsize=2, label=ours)
                ours = "_ours"
            if printed is not None:
                look: dict[str, Any] = {"marker": "*", "color": PAPER, "linestyle": "none", "markersize": 8}
                axis.plot(printed, height, label=theirs, **look)
                theirs = "_paper"
        axis.set_yticks(range(len(marks)), [title for title, *_ in reversed(marks)])
        axis.set(xlabel=what, ylim=(-0.5, len(marks) - 0.5))
        if theirs != "paper":
            axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)  # inside, its marks would look like data
        label(axis, note)
