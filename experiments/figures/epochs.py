"""Robust overfitting: what runs recorded along their epochs, a curve per schedule and weight perturbation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.correlation.courses import ARMS, arm, epochs, looks, seen
from experiments.correlation.rows import Row
from experiments.figures.curves import counted
from experiments.figures.style import COLOURS, MARKERS, canvas, label, log_values
from experiments.sweep.export import SweepResults

# (title, y label, quantity drawn full, quantity drawn thin, scale, whether the axis is logarithmic)
Panel = tuple[str, str, str, str, float, bool]
PANELS: tuple[Panel, ...] = (
    ("(a) PGD-10: test, thin: training images", "accuracy, %", "robust test", "robust train", 100.0, False),
    ("(b) clean: test, thin: training images", "accuracy, %", "clean test", "clean train", 100.0, False),
    ("(c) norm: adversarial loss, thin: clean", "rms norm of diag H", "norm adversarial", "norm clean", 1.0, True),
    ("(d) Gauss-Newton trace, adversarial loss", "tr G", "Gauss-Newton trace", "", 1.0, True),
    ("(e) noise of a step: tr(HC), thin: tr(C)", "trace", "tr(HC)", "tr(C)", 1.0, True),
    ("(f) ½ tr(HΣ): one step, thin: at rest", "½ tr(HΣ)", "half tr(HS)", "half tr(HS) at rest", 1.0, True),
)


def overfitting(results: SweepResults, chosen: Sequence[Row], path: Path) -> None:
    """Robust and clean accuracy, norms, Gauss-Newton trace, and the noise of a step with ½ tr(HΣ), along epochs.

    Bars of a single seed are 95% intervals as recorded; of several they are one standard deviation of a seed. Vertical
    lines are where learning rates dropped.
    """
    arms: dict[str, list[Row]] = {}
    for row in chosen:
        if looks(row):
            arms.setdefault(arm(row), []).append(row)
    with canvas(path, 2, 3) as axes:
        if not arms:
            axes[0][0].text(0.5, 0.5, "nothing was recorded along epochs", ha="center")
        for axis, (title, ylabel, full, thin, scale, logarithmic) in zip(axes.flat, PANELS, strict=True):
            drawn: list[float] = []
            for name, members in arms.items():
                index = ARMS.index(name)  # an arm looks the same whichever others are there
                drawn += _curve(axis, members, full, scale, index, name)
                if thin:
                    drawn += _curve(axis, members, thin, scale, index, None)
            for place in _drops(chosen):
                axis.axvline(place, color="#888888", linewidth=0.7, linestyle=":")
            axis.set(title=title, xlabel="epoch", ylabel=ylabel)
            if logarithmic:
                _scaled(axis, drawn)
        if arms:
            handles = axes[0][0].get_legend_handles_labels()
            axes[0][0].figure.legend(*handles, loc="outside upper center", ncols=len(arms))
        seeds = {row.seed for row in chosen}
        text = f"tier {results.tier}: {results.title}; {len(chosen)} runs, {counted(seeds)}"
        sizes = [len(members) for members in arms.values()]
        kinds = ["one standard deviation of a seed"] if max(sizes, default=1) > 1 else []
        told = "95% intervals as recorded"
        kinds += [f"where an arm has a single seed, {told}" if kinds else told] if 1 in sizes else []
        text += f"; bars: {'; '.join(kinds)}" if kinds else ""
        text += "; dotted: the learning rate drops. Σ = η²C for one step; at rest ½ tr(HΣ) = η tr(C) / (4(1-μ))"
        label(axes[0][0], text + (f"; {results.undone}" if results.missing else ""))


def _curve(axis: Any, members: Sequence[Row], name: str, scale: float, index: int, told: str | None) -> list[float]:
    """One arm's mean over seeds; `told` names a full curve in the legend, None draws a thin one without bars."""
    places = sorted({epoch for row in members for epoch in epochs(row)})
    values, reach = [], []
    for place in places:
        found = [seen(look, name) for row in members for look in looks(row) if look["epoch"] == place]
        here = np.array([one.value for one in found]) * scale
        values.append(float(here.mean()))
        reach.append(float(here.std(ddof=1)) if len(here) > 1 else 1.96 * scale * found[0].error)
    look: dict[str, Any] = {"color": COLOURS[index % len(COLOURS)], "linestyle": "--" if index % 2 else "-"}
    if told is None:
        axis.plot(places, values, linewidth=0.8, alpha=0.7, **look)
    else:
        look |= {"marker": MARKERS[index % len(MARKERS)], "markersize": 3.5}
        axis.errorbar(places, values, yerr=reach, label=told, capsize=2, elinewidth=0.8, **look)
    return values


def _drops(chosen: Sequence[Row]) -> list[float]:
    """Before which epochs a learning rate drops, as the configurations say."""
    found: set[float] = set()
    for row in chosen:
        train = row.result.config.train
        for milestone in (train.get("schedule") or {}).get("milestones") or ():
            place = milestone * train["epochs"] if milestone < 1 else milestone
            found.add(float(np.ceil(place)) - 0.5)
    return sorted(found)


def _scaled(axis: Any, drawn: Sequence[float]) -> None:
    """Logarithmic where everything is positive, bars cut off at the ends; else linear around 0, logarithmic beyond."""
    known = np.abs([value for value in drawn if value])
    if not len(known):
        return
    if min(drawn) > 0:
        log_values(axis, horizontal=False)
        axis.set_ylim(0.5 * min(drawn), 2.0 * max(drawn))
    else:
        axis.set_yscale("symlog", linthresh=float(np.quantile(known, 0.1)))
