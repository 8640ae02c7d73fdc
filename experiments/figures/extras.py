"""What the paper lacks: norms of both losses, norm against robustness, norms by layer, the control for rescaling."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from experiments.correlation.rows import Row, column, curvatures, learned, one_family, quantity, split
from experiments.figures.curves import BAND, LABELS, bar, draw, footer, images, robust_name
from experiments.figures.style import COLOURS, band, canvas, label, log_curvature, log_values, looks
from experiments.sweep.export import SweepResults
from hessdiag import networks


def has_angles(chosen: Sequence[Row]) -> bool:
    """Whether any run tells the angle between the parts of its diagonal."""
    return bool(np.isfinite(column(chosen, "cosine train/clean")).any())


def norms(results: SweepResults, chosen: Sequence[Row], path: Path) -> None:
    """Robustness, the norms of both losses, the invariant companion of the adversarial one, and whether the
    Gauss-Newton and the functional part add up (cosine above 0) or cancel (below); a curve per β or, where there are
    several, per method or network.
    """
    by = next((name for name in ("method", "network") if len(split(chosen, name)) > 1), "beta")
    panels = (
        (robust_name(chosen), "(a) robustness"),
        ("norm train/clean", "(b) norm, clean loss"),
        ("cosine train/clean", "(c) parts of the clean loss"),
        ("invariant train/adversarial", "(d) invariant companion, adversarial loss"),
        ("norm train/adversarial", "(e) norm, adversarial loss"),
        ("cosine train/adversarial", "(f) parts of the adversarial loss"),
    )
    with canvas(path, 2, 3) as axes:
        for axis, (name, title) in zip(axes.flat, panels, strict=True):
            draw(axis, chosen, name, by, "norms", scale=100.0 if name in ("aa", "aa2") else 1.0)
            axis.set(title=title, ylabel=LABELS[name])
            if "cosine" in name:
                axis.axhline(0.0, color="#444444", linewidth=0.8)
            elif "train" in name:
                log_values(axis, horizontal=False)
            log_curvature(axis, curvatures(chosen).tolist())
            band(axis, *BAND)
        axes[0][0].legend()
        told = footer(results, chosen, *(name for name, _ in panels))
        label(axes[0][0], told + images(chosen, robust_name(chosen)))


def scatter(results: SweepResults, chosen: Sequence[Row], path: Path) -> None:
    """Each run's robust accuracy, with Wilson's 95% interval over the test images, against three norms; the marker's
    size grows with max|σ''|.
    """
    chosen, everything = learned(chosen), chosen
    name = robust_name(chosen)
    norms = ("norm train/clean", "invariant train/clean", "plugin train/clean")
    with canvas(path, 1, 3) as axes:
        for axis, norm in zip(axes[0], norms, strict=True):
            for index, ((beta,), members) in enumerate(split(chosen, "beta").items()):
                look = looks(index)
                sizes = 12 + 14 * np.log2(1 + curvatures(members))
                x, y = column(members, norm), 100 * column(members, name)
                style = {"edgecolors": look["color"], "facecolors": look["markerfacecolor"], "marker": look["marker"]}
                reach = np.array([bar([row], name, 100.0)[1:] for row in members]).T
                axis.errorbar(x, y, yerr=reach, fmt="none", ecolor=look["color"], elinewidth=0.6, alpha=0.35)
                axis.scatter(x, y, s=sizes, label=f"β = {beta}", alpha=0.8, **style)
            log_values(axis, horizontal=True)
            axis.set_xlabel(LABELS[norm])
        axes[0][0].set_ylabel(LABELS[name])
        axes[0][0].legend()
        told = f"tier {results.tier}: {results.title}; {len(everything)} runs"
        told += f", {dead} of them did not learn and are not drawn" if (dead := len(everything) - len(chosen)) else ""
        told += "; a point a run, bars: 95% intervals of the draw of test images; larger markers: larger max|σ''|"
        label(axes[0][0], told)


def heat_map(results: SweepResults, chosen: Sequence[Row], path: Path) -> None:
    """log10 of every layer's norm over max|σ''|, the mean over the seeds whose networks learned, a panel per β; each
    layer is set against its own mean over all panels, for layers differ by far more than curvature moves them.
    """
    betas = split([row for row in learned(chosen) if row.beta is not None], "beta")
    layers = _in_order(chosen)
    with canvas(path, 1, max(1, len(betas)), width=3.4, height=0.16 * len(layers) + 1.6) as axes:
        tables = {}
        for (beta,), members in betas.items():
            one_family(members, f"heat map, β = {beta}")
            levels = sorted({row.curvature for row in members})
            tables[beta] = levels, np.array([[_mean(members, level, layer) for level in levels] for layer in layers])
        if not layers or not tables:
            axes[0][0].text(0.5, 0.5, "no norm by layer was measured", ha="center")
            label(axes[0][0], footer(results, chosen))
            return
        everything = np.concatenate([table for _, table in tables.values()], axis=1)
        centre = np.array([row[np.isfinite(row)].mean() for row in everything])[:, None]
        reach = np.nanmax(np.abs(everything - centre)) or 1.0
        for axis, (beta, (levels, table)) in zip(axes[0], tables.items(), strict=False):
            image = axis.imshow(table - centre, aspect="auto", cmap="cividis", vmin=-reach, vmax=reach)
            axis.set_xticks(range(len(levels)), [f"{level:g}" for level in levels], rotation=60)
            axis.set(title=f"β = {beta}", xlabel="max|σ''|")
            axis.grid(False)
            axis.set_yticks(range(len(layers)), layers if axis is axes[0][0] else [""] * len(layers), fontsize=6)
        axes[0][0].figure.colorbar(
            image, ax=axes[0].tolist(), label="log10 of rms norm (train/clean)\nover the layer's mean"
        )
        label(axes[0][0], footer(results, chosen))


def _in_order(chosen: Sequence[Row]) -> list[str]:
    """Every layer that was measured, from the input on: stored results are sorted by name, the network is not."""
    measured = dict.fromkeys(layer for row in chosen for layer in _norms(row))
    built: dict[str, None] = {}
    for members in split(chosen, "network").values():
        train = members[0].result.config.train
        with torch.device("meta"):  # names alone: no weights are drawn
            network = networks.build(train["network"], **(train.get("network_options") or {}))
        built |= dict.fromkeys(layer for layer, _ in network.named_parameters())
    return [layer for layer in built if layer in measured] + [layer for layer in measured if layer not in built]


def _norms(row: Row) -> dict[str, float]:
    layers = ((row.record.get("norms") or {}).get("train/clean") or {}).get("layers") or {}
    return {name: part["rms"] for name, part in layers.items() if part}


def _mean(members: Sequence[Row], level: float, layer: str) -> float:
    values = [_norms(row).get(layer) for row in members if row.curvature == level]
    logs = [np.log10(value) for value in values if value]
    return float(np.mean(logs)) if logs else float("nan")


def control(results: SweepResults, chosen: Sequence[Row], path: Path) -> None:
    """What one factor of α at a time does to robustness and to the norms; bars are one standard deviation
    of a seed. An arm whose networks did not learn is named and has no points: its numbers would squeeze the axes of the
    others.
    """
    panels = (
        (robust_name(chosen), LABELS[robust_name(chosen)]),
        ("clean", LABELS["clean"]),
        ("log norm train/clean", "ln of rms norm"),
        ("log invariant train/clean", "ln of invariant companion"),
        ("log effective", "ln of effective curvature"),
    )
    variants = split(chosen, "variant")
    with canvas(path, 1, len(panels), width=2.5, height=0.3 * len(variants) + 1.2) as axes:
        for axis, (name, title) in zip(axes[0], panels, strict=True):
            scale = 100.0 if "accuracy" in title else 1.0
            for height, members in enumerate(reversed(list(variants.values()))):
                alive = learned(members)
                if not alive:
                    place = axis.get_yaxis_transform()
                    axis.text(0.5, height, "did not learn", transform=place, ha="center", va="center", fontsize=7)
                    continue
                y = scale * quantity(alive, name)
                y = y[np.isfinite(y)]  # a seed without the number hides the others no more than a missing one
                reach = [float(np.std(y, ddof=1))] * 2 if len(y) > 1 else [0.0, 0.0]
                if len(y) == 1 and scale == 100.0:
                    reach = list(bar(alive, name, scale)[1:])
                if len(y):
                    sides = [[side] for side in reach] if any(reach) else None
                    axis.errorbar(float(np.mean(y)), height, xerr=sides, fmt="o", color=COLOURS[0], capsize=2)
            shown = [value[0] for value in reversed(list(variants))]
            axis.set_yticks(range(len(variants)), shown if axis is axes[0][0] else [""] * len(shown))
            axis.set(xlabel=title, ylim=(-0.5, len(variants) - 0.5))
        label(axes[0][0], footer(results, chosen, "clean"))
