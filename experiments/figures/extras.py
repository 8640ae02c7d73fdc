"""What the paper lacks: norm against robustness, norms by layer, the control for rescaling."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.correlation.judges import quantity
from experiments.correlation.rows import Row, column, curvatures, one_family, split
from experiments.figures.curves import footer, robust_name
from experiments.figures.style import COLOURS, canvas, label, log_values, looks
from experiments.sweep.export import SweepResults


def scatter(results: SweepResults, chosen: Sequence[Row], path: Path, note: str = "") -> None:
    """Each run's robust accuracy against three norms; the marker's size grows with max|σ''|."""
    name = robust_name(chosen)
    norms = (
        ("norm train/clean", "norm"),
        ("invariant train/clean", "invariant companion"),
        ("plugin train/clean", "plug-in Hutchinson (biased)"),
    )
    with canvas(path, 1, 3) as axes:
        for axis, (norm, title) in zip(axes[0], norms, strict=True):
            for index, ((beta,), members) in enumerate(split(chosen, "beta").items()):
                look = looks(index)
                sizes = 12 + 14 * np.log2(1 + curvatures(members))
                x, y = column(members, norm), 100 * column(members, name)
                style = {"edgecolors": look["color"], "facecolors": look["markerfacecolor"], "marker": look["marker"]}
                axis.scatter(x, y, s=sizes, label=f"β = {beta}", alpha=0.8, **style)
            log_values(axis, horizontal=True)
            axis.set_xlabel(title)
        axes[0][0].set_ylabel("robust accuracy, %")
        axes[0][0].legend()
        label(axes[0][0], footer(results, chosen) + note)


def heat_map(results: SweepResults, chosen: Sequence[Row], path: Path) -> None:
    """log10 of every layer's norm over max|σ''|, the mean over seeds, a panel per β."""
    betas = split([row for row in chosen if row.beta is not None], "beta")
    layers = list(_norms(chosen[0]))
    with canvas(path, 1, max(1, len(betas)), width=3.4, height=0.16 * len(layers) + 1.6) as axes:
        tables = {}
        for (beta,), members in betas.items():
            one_family(members, f"heat map, β = {beta}")
            levels = sorted({row.curvature for row in members})
            tables[beta] = levels, np.array([[_mean(members, level, layer) for level in levels] for layer in layers])
        finite = np.concatenate([table[np.isfinite(table)] for _, table in tables.values()] or [np.zeros(1)])
        for axis, (beta, (levels, table)) in zip(axes[0], tables.items(), strict=False):
            image = axis.imshow(table, aspect="auto", cmap="cividis", vmin=finite.min(), vmax=finite.max())
            axis.set_xticks(range(len(levels)), [f"{level:g}" for level in levels], rotation=60)
            axis.set(title=f"β = {beta}", xlabel="max|σ''|")
            axis.grid(False)
            axis.set_yticks(range(len(layers)), layers if axis is axes[0][0] else [""] * len(layers), fontsize=6)
        axes[0][0].figure.colorbar(image, ax=axes[0].tolist(), label="log10 rms norm, train/clean")
        label(axes[0][0], footer(results, chosen))


def _norms(row: Row) -> dict[str, float]:
    layers = ((row.record.get("norms") or {}).get("train/clean") or {}).get("layers") or {}
    return {name: part["rms"] for name, part in layers.items() if part}


def _mean(members: Sequence[Row], level: float, layer: str) -> float:
    values = [_norms(row).get(layer) for row in members if row.curvature == level]
    logs = [np.log10(value) for value in values if value]
    return float(np.mean(logs)) if logs else float("nan")


def control(results: SweepResults, chosen: Sequence[Row], path: Path) -> None:
    """What one factor of α at a time does to robustness and to the norms; bars are one standard deviation
    of a seed.
    """
    panels = (
        (robust_name(chosen), "robust accuracy, %"),
        ("clean", "clean accuracy, %"),
        ("log norm train/clean", "log norm"),
        ("log invariant train/clean", "log invariant companion"),
        ("log effective", "log effective curvature"),
    )
    variants = split(chosen, "variant")
    with canvas(path, 1, len(panels), width=2.5, height=0.3 * len(variants) + 1.2) as axes:
        for axis, (name, title) in zip(axes[0], panels, strict=True):
            scale = 100.0 if "accuracy" in title else 1.0
            for height, members in enumerate(reversed(list(variants.values()))):
                y = scale * quantity(members, name)
                spread = float(np.std(y, ddof=1)) if len(y) > 1 else None
                axis.errorbar(float(np.mean(y)), height, xerr=spread, fmt="o", color=COLOURS[0], capsize=2)
            shown = [value[0] for value in reversed(list(variants))]
            axis.set_yticks(range(len(variants)), shown if axis is axes[0][0] else [""] * len(shown))
            axis.set_xlabel(title)
        label(axes[0][0], footer(results, chosen))
