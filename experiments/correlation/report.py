"""Everything that the statistics say of one sweep, as plain values: correlations, peaks, U-shapes, coincidence."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from experiments.correlation.association import within
from experiments.correlation.coefficients import KINDS, Array, partial
from experiments.correlation.coincidence import coincide
from experiments.correlation.peaks import FITS, locate
from experiments.correlation.rows import NORMS, Row, column, curvatures, learned, one_family, quantity, split
from experiments.correlation.ushape import u_shape
from experiments.sweep.records import NORMAL
from hessdiag.errors import ConfigurationError

GIVEN: dict[str, tuple[str, ...]] = {
    "nothing": (),
    "clean accuracy": ("clean",),
    "effective curvature": ("log effective",),
}
WITHIN = "activation and seed"
Plain = dict[str, Any]


def analyse(chosen: Sequence[Row], *, margin: float, resamples: int = 1000, seed: int = 0) -> Plain:
    """The analysis of one experiment; rows of several (networks, methods, data) are analysed apart. As in the pictures,
    networks that did not learn are left out, and counted.
    """
    report: Plain = {}
    for (method, network, data), members in split(chosen, "method", "network", "data").items():
        finite = [row for row in learned(members) if np.isfinite(row.curvature)]
        if len({row.configuration for row in finite}) < 4 or any(row.variant for row in finite):
            continue
        one_family(members, f"analysis of {method}, {network}, {data}")
        generator = np.random.default_rng([seed, *str(members[0].family).encode()])
        report[f"{method}, {network}, {data}"] = {
            "runs": len(finite),
            "unlearned": len(members) - len(learned(members)),
            "configurations": len({row.configuration for row in finite}),
            "seeds": len({row.seed for row in finite}),
            "correlations": correlations(finite),
            "curves": _curves(finite, resamples, generator),
            "coincidence": _coincidence(finite, margin, resamples, generator),
        }
    return report


def correlations(chosen: Sequence[Row]) -> list[Plain]:
    """Log-norm with robust accuracy: three norms, four places.

    Along the configurations three coefficients, given nothing or a covariate: descriptions, without an interval. Among
    runs of one configuration, given activation and seed, Pearson's with its p-value and 95% interval (`association`).
    """
    robust = column(chosen, "aa2")
    cells = [row.configuration for row in chosen]
    found: list[Plain] = []
    for place in ("train/clean", "train/adversarial", "test/clean", "test/adversarial"):
        for norm in NORMS:
            x = quantity(chosen, f"log {norm} {place}")
            if not np.isfinite(x).any() or not np.isfinite(robust).any():
                continue
            about: Plain = {"norm": norm, "place": place}
            for given, names in GIVEN.items():
                if names and place != "train/clean":
                    continue
                means = _means([x, robust, *(quantity(chosen, name) for name in names)], cells)
                if means.shape[1] < 4 + len(names):
                    continue
                for kind in KINDS:
                    value = partial(kind, means[0], means[1], list(means[2:]))
                    found.append({**about, "kind": kind, "given": given, "value": value, **_none(means.shape[1])})
            try:
                beside = within(cells, [row.seed for row in chosen], x, robust)
            except ConfigurationError:
                continue
            if not np.isfinite(beside.correlation):  # every run as robust as its neighbours
                continue
            about |= {"kind": "pearson", "given": WITHIN, "value": beside.correlation}
            low, high = _fisher(beside.correlation, beside.slope.freedom)
            ends = {"low": low, "high": high, "p_value": beside.p_value, "configurations": beside.cells}
            found.append({**about, **ends, "points": beside.slope.value})
    return found


def _none(configurations: int) -> Plain:
    return {"low": None, "high": None, "p_value": None, "configurations": configurations}


def _means(columns: Sequence[Array], cells: Sequence[Hashable]) -> Array:
    """Means over the runs of each configuration that have every number."""
    finite = np.isfinite(columns).all(0)
    members: dict[Hashable, list[int]] = {}
    for index in np.flatnonzero(finite):
        members.setdefault(cells[int(index)], []).append(int(index))
    return np.array([[float(values[own].mean()) for own in members.values()] for values in columns])


def _fisher(value: float, freedom: float) -> tuple[float, float]:
    """95% interval of a Pearson correlation of residuals, by Fisher's z."""
    if not abs(value) < 1 or freedom < 3:
        return float("nan"), float("nan")
    half = NORMAL / np.sqrt(freedom - 1)
    return float(np.tanh(np.arctanh(value) - half)), float(np.tanh(np.arctanh(value) + half))


def _curves(chosen: Sequence[Row], resamples: int, generator: np.random.Generator) -> list[Plain]:
    """Where each curve has its extreme by both fits, and whether it is U-shaped (robustness: inverted)."""
    found = []
    for (beta,), members in split(chosen, "beta").items():
        norms = [f"log {norm} {place}" for place in ("train/clean", "train/adversarial") for norm in NORMS]
        for name in ("aa2", "clean", *(name for name in norms if np.isfinite(quantity(members, name)).any())):
            lowest = name.startswith("log ")
            x, y = curvatures(members), quantity(members, name)
            try:
                keep: Plain = {"seed": [row.seed for row in members]}
                sampled = {**keep, "lowest": lowest, "resamples": resamples, "generator": generator}
                peaks = {fit: asdict(locate(x, y, fit=fit, **sampled)) for fit in FITS}
                shape = asdict(u_shape(x, y, inverted=not lowest, **keep))
            except ConfigurationError as error:
                found.append({"beta": beta, "quantity": name, "refused": str(error)})
                continue
            found.append({"beta": beta, "quantity": name, "extreme": peaks, "u_shape": shape})
    return found


def _coincidence(chosen: Sequence[Row], margin: float, resamples: int, generator: np.random.Generator) -> Plain | None:
    chosen = [row for row in chosen if row.beta is not None]
    if len({row.beta for row in chosen}) < 2:
        return None
    group = [row.beta for row in chosen]
    try:
        result = coincide(
            curvatures(chosen), column(chosen, "aa2"), group, margin=margin, resamples=resamples, generator=generator
        )
    except ConfigurationError as error:
        return {"refused": str(error)}
    return asdict(result)
