"""The numbers behind a figure: a level's means over seeds as Markdown, every run as CSV."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.correlation.rows import Row, column, learned, split
from experiments.figures.curves import footer, images, robust_name
from experiments.figures.tables import mean_and_spread, write_csv, write_markdown
from experiments.sweep.export import SweepResults

SHARES = {"clean": "clean, %", "aa2": "AA-2, %", "aa": "AA, %"}
NUMBERS = {
    "norm train/clean": "norm, clean loss",
    "norm train/adversarial": "norm, adversarial loss",
    "invariant train/adversarial": "its invariant companion",
    "cosine train/clean": "cosine of the parts, clean",
    "cosine train/adversarial": "adversarial",
}
BY = {"method": "method", "network": "network", "beta": "β", "variant": "variant"}


def numbers(results: SweepResults, chosen: Sequence[Row], path: Path) -> None:
    """Write both, `path`.md and `path`.csv."""
    by = [name for name in BY if len(split(chosen, name)) > 1]
    robust = robust_name(chosen)
    shares = {name: SHARES[name] for name in ("clean", robust)}
    head = [*(BY[name] for name in by), "max|σ''|", "seeds", *shares.values(), *NUMBERS.values()]
    curves = [sorted(members, key=lambda row: (row.curvature, row.seed)) for members in split(chosen, *by).values()]
    lines = []
    for level in (members for curve in curves for members in split(curve, "curvature").values()):
        alive = learned(level)
        cells = [_accuracy(alive, name) for name in shares] + [_quantity(alive, name) for name in NUMBERS]
        seeds = f"{len(level)}" + (f", of which {len(level) - len(alive)} did not learn" * (alive != level))
        lines.append([*(str(getattr(level[0], name)) for name in by), f"{level[0].curvature:g}", seeds, *cells])
    told = footer(results, chosen) + images(chosen, robust)
    told += "; means over seeds ± the standard deviation of one; run by run in the CSV file of the same name"
    write_markdown(path, head, lines, told)
    ends = [f"{end}{name}" for name in (*shares, *NUMBERS) for end in ("", "low ", "high ")]
    head = ["key", *BY, "max|σ''|", "seed", *ends]
    write_csv(path, head, [_run(row, ends) for curve in curves for row in curve])


def _run(row: Row, ends: Sequence[str]) -> list[str]:
    values = [row.value(name) for name in ends]
    told = ["" if math.isnan(value) else f"{value:.6g}" for value in values]
    return [row.key, *(str(getattr(row, name)) for name in BY), f"{row.curvature:g}", str(row.seed), *told]


def _accuracy(members: Sequence[Row], name: str) -> str:
    mean, spread = mean_and_spread(100 * column(members, name))
    return _told(f"{mean:.1f}", f"{spread:.1f}", mean, spread)


def _quantity(members: Sequence[Row], name: str) -> str:
    mean, spread = mean_and_spread(column(members, name))
    if name.startswith("cosine"):
        return _told(f"{mean:+.2f}", f"{spread:.2f}", mean, spread)
    if not (math.isfinite(mean) and mean > 0):
        return "-"
    digits = 2 - math.floor(math.log10(mean))  # three of the mean
    if not 0 <= digits < 9:
        return _told(f"{mean:.3g}", f"{spread:.3g}", mean, spread)
    return _told(f"{mean:.{digits}f}", f"{spread:.{digits}f}", mean, spread)


def _told(mean: str, spread: str, *values: float) -> str:
    if not np.isfinite(values[0]):
        return "-"
    return f"{mean} ± {spread}" if np.isfinite(values[1]) else mean
