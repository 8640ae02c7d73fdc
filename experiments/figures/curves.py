"""Figures 3-7: what a run measured against its activation, a curve per β, network or method."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.correlation.printed import PRINTED
from experiments.correlation.rows import Row, column, curvatures, learned, one_family, split
from experiments.figures.style import PAPER, band, canvas, label, legend_above, log_curvature, log_values, looks
from experiments.sweep.export import SweepResults

BAND = (4.0, 10.0)
LABELS = {
    "aa2": "robust accuracy (AA-2), %",
    "aa": "robust accuracy (AA), %",
    "clean": "clean accuracy, %",
    "norm train/clean": "rms norm of diag H",
    "norm train/adversarial": "rms norm, adversarial loss",
    "invariant train/clean": "invariant companion, rms",
    "invariant train/adversarial": "invariant companion, adversarial loss",
    "cosine train/clean": "cosine, clean loss",
    "cosine train/adversarial": "cosine, adversarial loss",
    "plugin train/clean": "plug-in Hutchinson norm, rms (biased)",
}

INTERVALS = (
    (("aa", "aa2", "clean"), "Wilson's, of the draw of test images"),
    (("norm", "invariant", "cosine"), "of the norm's measurement"),
)
"""Quantities that a single run tells with an interval, and what it is the interval of."""


def robust_name(chosen: Sequence[Row]) -> str:
    """AA where every run has it, else AA-2."""
    return "aa" if np.isfinite(column(chosen, "aa")).all() else "aa2"


def draw(
    axis: Any,
    chosen: Sequence[Row],
    name: str,
    by: str,
    where: str,
    *,
    over: Callable[[Row], float] = lambda row: row.curvature,
    scale: float = 100.0,
) -> None:
    """Means over seeds with bars as `bar` gives them, small dots the seeds; networks that did not learn are left out.
    Curves with bars stand a little aside of each other.
    """
    curves = split(learned(chosen), by)
    for index, ((value,), members) in enumerate(curves.items()):
        one_family(members, f"{where}, {by} = {value}")
        drawn = [row for row in members if np.isfinite(over(row)) and np.isfinite(row.value(name))]
        x, y = np.array([over(row) for row in drawn]), column(drawn, name) * scale
        levels = np.unique(x)
        if not len(levels):
            continue
        points = [bar([row for row in drawn if over(row) == level], name, scale) for level in levels]
        mean, spread = np.array([point[0] for point in points]), np.array([point[1:] for point in points]).T
        shown = f"β = {value}" if by == "beta" else str(value)
        look = looks(index)
        aside = 1.05 ** (index - (len(curves) - 1) / 2) if spread.any() else 1.0  # bars would hide each other
        axis.errorbar(
            levels * aside, mean, yerr=spread if spread.any() else None, label=shown, capsize=2, elinewidth=0.9, **look
        )
        if len(y) > len(levels):
            axis.plot(x * aside, y, linestyle="none", marker=".", markersize=2.5, color=look["color"], alpha=0.5)


def bar(members: Sequence[Row], name: str, scale: float) -> tuple[float, float, float]:
    """The mean over seeds, and how far its bar reaches down and up: one standard deviation of a seed; for a single
    seed the 95% interval of that run: Wilson's over the test images for an accuracy, the measurement's for a norm.
    """
    values = scale * column(members, name)
    values = values[np.isfinite(values)]
    if not len(values):
        return float("nan"), 0.0, 0.0
    mean = float(values.mean())
    if len(values) > 1:
        return mean, float(values.std(ddof=1)), float(values.std(ddof=1))
    low, high = (scale * members[0].value(f"{side} {name}") for side in ("low", "high"))
    if not (np.isfinite(low) and np.isfinite(high)):
        return mean, 0.0, 0.0
    return mean, max(mean - low, 0.0), max(high - mean, 0.0)


def counted(seeds: Collection[int]) -> str:
    """How many seeds, and that one of them shows no scatter."""
    return f"{len(seeds)} seeds" if len(seeds) > 1 else "one seed: no scatter of seeds shown"


def bars(chosen: Sequence[Row], names: Sequence[str]) -> str:
    """What the bars of `bar` are, where there are any: of some levels one kind, of others the other."""
    levels = split(learned(chosen), "configuration").values()
    drawn = [(name, [row for row in level if np.isfinite(row.value(name))]) for name in names for level in levels]
    several = any(len(level) > 1 for _, level in drawn)
    alone = {name for name, level in drawn if len(level) == 1 and np.isfinite(level[0].value(f"low {name}"))}
    kinds = [told for of, told in INTERVALS if any(name.split()[0] in of for name in alone)]
    spread = "one standard deviation of a seed"
    if not kinds:
        return f"; bars: {spread}" if several else ""
    none = "; the plug-in norm has none" if any(name.startswith("plugin") for name in names) else ""
    told = f"95% intervals ({', or '.join(kinds)}){none}"
    return f"; bars: {spread}; where a level has a single seed, {told}" if several else f"; bars: {told}"


def footer(results: SweepResults, chosen: Sequence[Row], *names: str) -> str:
    """Tier, setting, seeds, what is missing, and what the bars of the quantities in `names` are."""
    text = f"tier {results.tier}: {results.title}; {len(chosen)} runs, {counted({row.seed for row in chosen})}"
    text += bars(chosen, names) if names else ""
    if stopped := sum(row.collapsed for row in chosen):
        text += f"; {stopped} stopped early by catastrophic overfitting"
    if dead := len(chosen) - len(learned(chosen)):
        text += f"; {dead} did not learn (accuracy at chance) and are not drawn"
    return text + (f"; {results.undone}" if results.missing else "")


def images(chosen: Sequence[Row], name: str) -> str:
    """How far the draw of the test images alone moves an accuracy: its standard error, which no seed shows."""
    tables = [row.record.get({"clean": "clean_accuracy"}.get(name, name)) or {} for row in chosen]
    pairs = [(float(table["value"]), int(table["samples"])) for table in tables if table.get("samples")]
    if not pairs:
        return ""
    error = 100 * float(np.mean([np.sqrt(max(value * (1 - value), 0.0) / count) for value, count in pairs]))
    fewest = min(count for _, count in pairs)
    return f"; on {fewest:,} test images, whose draw alone scatters an accuracy by {error:.1f} points"


def papers_setting(chosen: Sequence[Row]) -> bool:
    """Whether the paper's printed numbers may stand on the same axis: CIFAR-10 with ResNet-18."""
    return all(row.data == "cifar10" and row.network == "resnet18" for row in chosen)


def paper_marks(axis: Any, chosen: Sequence[Row], name: str, over: Callable[[Row], float] | None = None) -> None:
    """Table 1's numbers at max|σ''| = 7, where the setting is the paper's."""
    if not papers_setting(chosen):
        return
    for index, cell in enumerate(c for c in PRINTED if c.key.startswith("rct")):
        value = cell.standard if name == "clean" else cell.robust
        alpha = float(cell.activation.rpartition("=")[2])
        text = "paper, Table 1 (DAJAT, AA)" if index == 0 else None
        axis.plot(alpha if over else 7.0, value, marker="*", color=PAPER, markersize=9, linestyle="none", label=text)


def figure3(results: SweepResults, chosen: Sequence[Row], path: Path) -> None:
    """Robustness over α and over max|σ''| for three β."""
    name = robust_name(chosen)
    with canvas(path, 1, 2) as axes:
        left, right = axes[0]
        draw(left, chosen, name, "beta", "figure3", over=_alpha)
        draw(right, chosen, name, "beta", "figure3")
        left.set(xlabel="α", ylabel=LABELS[name], title="(a) over α")
        log_values(left, horizontal=True)
        paper_marks(left, chosen, name, _alpha)
        paper_marks(right, chosen, name)
        right.set(title="(b) over max|σ''|")
        log_curvature(right, curvatures(chosen).tolist())
        band(right, *BAND)
        legend_above(right)
        label(left, footer(results, chosen, name) + images(chosen, name))


def _alpha(row: Row) -> float:
    return row.alpha if row.alpha is not None else float("nan")


def _one_panel(by: str, figure: str) -> Callable[[SweepResults, Sequence[Row], Path], None]:
    def drawing(results: SweepResults, chosen: Sequence[Row], path: Path) -> None:
        name = robust_name(chosen)
        with canvas(path, width=4.8, height=3.2) as axes:
            axis = axes[0][0]
            draw(axis, chosen, name, by, figure)
            paper_marks(axis, [row for row in chosen if row.method == "dajat"] or chosen, name)
            axis.set(ylabel=LABELS[name])
            log_curvature(axis, curvatures(chosen).tolist())
            band(axis, *BAND)
            legend_above(axis)
            label(axis, footer(results, chosen, name) + images(chosen, name))

    return drawing


figure4 = _one_panel("network", "figure4")
figure5 = _one_panel("method", "figure5")
figure6 = _one_panel("method", "figure6")


def figure7(results: SweepResults, chosen: Sequence[Row], path: Path) -> None:
    """The norm and clean accuracy; beside the norm its invariant companion and the plug-in norm."""
    panels = (
        ("norm train/clean", "(a) norm of the diagonal", 1.0),
        ("clean", "(b) clean accuracy", 100.0),
        ("invariant train/clean", "(a') rescaling-invariant companion", 1.0),
        ("plugin train/clean", "(a'') plug-in Hutchinson norm", 1.0),
    )
    with canvas(path, 2, 2) as axes:
        for axis, (name, title, scale) in zip(axes.flat, panels, strict=True):
            draw(axis, chosen, name, "beta", "figure7", scale=scale)
            axis.set(title=title, ylabel=LABELS[name])
            if scale == 1.0:
                log_values(axis, horizontal=False)
            log_curvature(axis, curvatures(chosen).tolist())
            band(axis, *BAND)
        axes[0][0].legend()
        label(axes[0][0], footer(results, chosen, *(name for name, _, _ in panels)))


DRAWINGS: dict[str, Callable[[SweepResults, Sequence[Row], Path], None]] = {
    "figure3": figure3,
    "figure4": figure4,
    "figure5": figure5,
    "figure6": figure6,
    "figure7": figure7,
}
