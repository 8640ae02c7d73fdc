"""What a sweep could decide, before it runs: from the scatter of the nearest stored setting.

With residual scatter s of one run (level and seed taken away), a contrast of variance factor v has

    half-width = t(F + n - 1) s sqrt(k v),    power = P(T' > t),  T' noncentral with effect / (s sqrt(k v)),

F, n and k as in `contrasts`; the design gives v. Neighbouring levels are taken to move together as much as k says. No
correction for several claims is in it (Holm's makes the first of m claims need level / m).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from experiments.correlation.contrasts import INFLATION, PRIOR_FREEDOM, Layout, Plan
from experiments.correlation.controls import roles
from experiments.correlation.judges import Rules, groups
from experiments.correlation.rows import Row, planned, quantity, rows, split
from experiments.sweep.export import SweepResults
from experiments.sweep.grid import Sweep
from hessdiag.errors import ConfigurationError

MOST_SEEDS = 200
WANTED = 0.9
ENOUGH = 6
CURVE = ("method", "network", "data", "beta")
ALONG = "overfitting"  # judged along epochs, where nothing is forecast


@dataclass(frozen=True)
class Scatter:
    """Residual standard deviation of a run in a stored sweep, and how far that sweep is from the one asked about."""

    source: str
    value: float
    freedom: int
    differs: tuple[str, ...]


Wanted = tuple[str, str, Layout, dict[Hashable, float]]


@dataclass(frozen=True)
class Forecast:
    """One contrast of one curve: half-width, power for the named effect, seeds for 90% (0: more than 200), and the
    chance to show that a difference that is none lies within δ.
    """

    curve: str
    contrast: str
    quantity: str
    half: float
    power: float
    seeds: int
    effect: float
    equal: float


def half_width(plan: Plan, scatter: float, level: float, ratio: float = INFLATION) -> float:
    """Expected half-width where a contrast's own variance is `ratio` times the pooled one."""
    variance = scatter**2 * ratio * plan.factor * plan.overstated(ratio)
    return float(stats.t.isf(level / 2, plan.freedom)) * math.sqrt(variance)


def power_of(plan: Plan, scatter: float, effect: float, level: float, ratio: float = INFLATION) -> float:
    """The chance that the interval excludes 0 on the side of a true `effect`."""
    shift = effect / (scatter * math.sqrt(ratio * plan.factor))
    if shift > 37:
        return 1.0
    bound = float(stats.t.isf(level / 2, plan.freedom)) * math.sqrt(plan.overstated(ratio))
    return float(stats.nct.sf(bound, plan.freedom, shift))


def equal_of(plan: Plan, scatter: float, delta: float, level: float, ratio: float = INFLATION) -> float:
    """The chance that two one-sided tests show a true difference of 0 to be within δ, the error at its mean."""
    deviation = scatter * math.sqrt(ratio * plan.factor)
    room = delta - float(stats.t.isf(level, plan.freedom)) * deviation * math.sqrt(plan.overstated(ratio))
    return max(0.0, float(2 * stats.norm.cdf(room / deviation) - 1))


def seeds_needed(
    weights: Mapping[Hashable, float], cells: int, scatter: float, effect: float, level: float, ratio: float
) -> int:
    """The fewest seeds, each with all cells, that give 90% power; 0 where 200 do not."""
    length = sum(weight**2 for weight in weights.values())
    for number in range(2, MOST_SEEDS + 1):
        rest = (number - 1) * (cells - 2)
        plan = Plan(length / number, min(PRIOR_FREEDOM, float(rest)), number - 1, ratio)
        if power_of(plan, scatter, effect, level, ratio) >= WANTED:
            return number
    return 0


def nearest_scatter(chosen: Sequence[Row], figure: str, name: str, results: Sequence[SweepResults]) -> Scatter | None:
    """The scatter of the stored sweep that has most in common with these runs, among those whose seeds tell it by
    `ENOUGH` degrees of freedom or more: a begun sweep of a seed and a bit tells nothing. Where none does, of all.
    """
    best: tuple[tuple[bool, int, int], Scatter] | None = None
    for sweep in results:
        if sweep.figure.startswith("table") or sweep.figure == ALONG:  # cells that are no levels of a curve
            continue
        for members in split(rows(sweep), "method", "network", "data").values():
            squares, freedom = 0.0, 0
            for curve in split(members, "beta").values():
                cells = [(row.activation, row.variant) for row in curve]
                layout = Layout(cells, [row.seed for row in curve], quantity(curve, name))
                if layout.freedom > 0 and len(layout.seeds) > 1:
                    squares += float((layout.residuals() ** 2).sum())
                    freedom += layout.freedom
            if not freedom or not squares > 0:
                continue
            points, differs = _compared(chosen[0], members[0], figure, sweep.figure)
            found = Scatter(sweep.name, math.sqrt(squares / freedom), freedom, differs)
            rank = freedom >= ENOUGH, points, freedom
            if best is None or rank > best[0]:
                best = rank, found
    return None if best is None else best[1]


def _compared(wanted: Row, stored: Row, figure: str, other: str) -> tuple[int, tuple[str, ...]]:
    """How near a stored run is, and what differs."""
    images = [row.result.config.attack.get("aa2_samples") for row in (wanted, stored)]
    pairs: dict[str, tuple[int, Any, Any]] = {
        "data": (8, wanted.data.split(" ")[0], stored.data.split(" ")[0]),
        "method": (4, wanted.method, stored.method),
        "network": (2, wanted.network, stored.network),
        "figure": (1, figure, other),
        "test images": (1, images[0], images[1]),
        "epochs": (1, wanted.result.config.train.get("epochs"), stored.result.config.train.get("epochs")),
    }
    points = sum(int(weight) for weight, a, b in pairs.values() if a == b)
    return points, tuple(f"{name} {b} for {a}" for name, (_, a, b) in pairs.items() if a != b)


def contrasts_of(chosen: Sequence[Row], figure: str, rules: Rules) -> Iterator[Wanted]:
    """Curve, contrast, design and weights of everything that the rules compare within a sweep."""
    if figure == "control":
        cells = roles(chosen)
        layout = Layout(cells, [row.seed for row in chosen], np.zeros(len(chosen)))
        for high, low in (("all", "same"), ("init", "none"), ("lr", "none"), ("decay", "none")):
            if high in layout.cells and low in layout.cells:
                yield "", f"{high} less {low}", layout, {high: 1.0, low: -1.0}
        return
    if figure.startswith("table"):
        names = [row.activation for row in chosen]
        layout = Layout(names, [row.seed for row in chosen], np.zeros(len(chosen)))
        if len(layout.cells) > 1:
            yield "", "any two activations", layout, {layout.cells[0]: 1.0, layout.cells[1]: -1.0}
        return
    curves = split((row for row in chosen if row.beta is not None and math.isfinite(row.curvature)), *CURVE)
    for values, members in curves.items():
        varying = [i for i in range(len(CURVE)) if len({other[i] for other in curves}) > 1]
        curve = ", ".join(f"β={values[i]}" if CURVE[i] == "beta" else str(values[i]) for i in varying)
        levels: list[Hashable] = [round(row.curvature, 9) for row in members]
        layout = Layout(levels, [row.seed for row in members], np.zeros(len(members)), inflation=INFLATION)
        found = groups(layout.cells, rules)
        for side in ("low", "high"):
            if found["band"] and found[side]:
                weights: dict[Hashable, float] = dict.fromkeys(found["band"], 1 / len(found["band"]))
                yield curve, f"band less {side}", layout, weights | dict.fromkeys(found[side], -1 / len(found[side]))
        ranges = {f"change below {rules.band[0]:g}": (0.0, rules.band[0])}
        ranges[f"change above {rules.band[1]:g}"] = (rules.band[1], math.inf)
        for text, (start, end) in ranges.items():
            inside = [level for level in found_levels(layout) if start <= level <= end]
            if len(inside) > 1:
                t = np.log(inside) - np.mean(np.log(inside))
                yield curve, text, layout, dict(zip(inside, np.ptp(t) * t / (t**2).sum(), strict=True))


def found_levels(layout: Layout) -> list[float]:
    """The levels of a curve's design, in order."""
    return sorted(float(cell) for cell in layout.cells)  # type: ignore[arg-type]


def forecast(
    sweep: Sweep, results: Sequence[SweepResults], rules: Rules, quantities: Sequence[str]
) -> tuple[list[Forecast], dict[str, Scatter]]:
    """Every contrast of a sweep by every quantity, and where each quantity's scatter comes from."""
    if sweep.figure == ALONG:
        raise ConfigurationError(
            f"{sweep.name}: its rules compare epochs of a run, whose scatter nothing here forecasts; "
            "docs/campaign.md says what they judge"
        )
    chosen = planned(sweep)
    sources: dict[str, Scatter] = {}
    found = []
    for name in quantities:
        scatter = nearest_scatter(chosen, sweep.figure, name, results)
        if scatter is None:
            continue
        sources[name] = scatter
        delta, effect = rules.of(name)
        for curve, contrast, layout, weights in contrasts_of(chosen, sweep.figure, rules):
            plan = layout.planned(weights)
            ratio = layout.inflation
            needed = seeds_needed(weights, len(layout.cells), scatter.value, effect, rules.level, ratio)
            half, reached, equal = math.inf, 0.0, 0.0  # one seed decides nothing
            if plan is not None:
                half = half_width(plan, scatter.value, rules.level, ratio)
                reached = power_of(plan, scatter.value, effect, rules.level, ratio)
                equal = equal_of(plan, scatter.value, delta, rules.level, ratio)
            found.append(Forecast(curve, contrast, name, half, reached, needed, effect, equal))
    if not sources:
        raise ConfigurationError(
            "no stored setting has several seeds, so nothing tells their scatter; export one first"
        )
    return found, sources
