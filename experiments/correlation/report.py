"""Everything that the statistics say of one sweep, as plain values: correlations, peaks, U-shapes, coincidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from experiments.correlation.association import associate
from experiments.correlation.coefficients import KINDS
from experiments.correlation.coincidence import coincide
from experiments.correlation.judges import quantity
from experiments.correlation.peaks import FITS, locate
from experiments.correlation.rows import NORMS, Row, column, curvatures, one_family, split
from experiments.correlation.ushape import u_shape
from hessdiag.errors import ConfigurationError

GIVEN: dict[str, tuple[str, ...]] = {
    "nothing": (),
    "clean accuracy": ("clean",),
    "effective curvature": ("log effective",),
    "β": (),  # within curves: β may move norm and robustness at once, without one having to do with the other
}
Plain = dict[str, Any]


def analyse(chosen: Sequence[Row], *, margin: float, resamples: int = 1000, seed: int = 0) -> Plain:
    """The analysis of one experiment; rows of several (networks, methods, data) are analysed apart."""
    report: Plain = {}
    for (method, network, data), members in split(chosen, "method", "network", "data").items():
        finite = [row for row in members if np.isfinite(row.curvature)]
        if len({row.configuration for row in finite}) < 4 or any(row.variant for row in finite):
            continue
        one_family(members, f"analysis of {method}, {network}, {data}")
        generator = np.random.default_rng([seed, *str(members[0].family).encode()])
        report[f"{method}, {network}, {data}"] = {
            "runs": len(finite),
            "configurations": len({row.configuration for row in finite}),
            "seeds": len({row.seed for row in finite}),
            "correlations": correlations(finite, resamples, generator),
            "curves": _curves(finite, resamples, generator),
            "coincidence": _coincidence(finite, margin, resamples, generator),
        }
    return report


def correlations(chosen: Sequence[Row], resamples: int, generator: np.random.Generator) -> list[Plain]:
    """Log-norm with robust accuracy: three norms, four places, three coefficients, given nothing or a covariate."""
    robust = column(chosen, "aa2")
    cluster = [row.configuration for row in chosen]
    found = []
    for place in ("train/clean", "train/adversarial", "test/clean", "test/adversarial"):
        for norm in NORMS:
            x = quantity(chosen, f"log {norm} {place}")
            if not np.isfinite(x).any() or not np.isfinite(robust).any():
                continue
            for given, names in GIVEN.items():
                if given != "nothing" and place != "train/clean":
                    continue
                covariates = {name: quantity(chosen, name) for name in names}
                betas = [row.beta for row in chosen] if given == "β" else []
                if given == "β" and len(set(betas)) < 2:
                    continue
                for beta in list(dict.fromkeys(betas))[1:]:
                    covariates[f"β = {beta}"] = np.array([float(other == beta) for other in betas])
                for kind in KINDS:
                    result = associate(
                        x,
                        robust,
                        cluster=cluster,
                        kind=kind,
                        covariates=covariates,
                        strata=betas or None,
                        resamples=resamples,
                        generator=generator,
                    )
                    found.append({"norm": norm, "place": place, **asdict(result), "given": given})
    return found


def _curves(chosen: Sequence[Row], resamples: int, generator: np.random.Generator) -> list[Plain]:
    """Where each curve has its extreme by both fits, and whether it is U-shaped (robustness: inverted)."""
    found = []
    for (beta,), members in split(chosen, "beta").items():
        for name in ("aa2", "clean", *(f"log {norm} train/clean" for norm in NORMS)):
            lowest = name.startswith("log ")
            x, y = curvatures(members), quantity(members, name)
            try:
                peaks = {
                    fit: asdict(locate(x, y, fit=fit, lowest=lowest, resamples=resamples, generator=generator))
                    for fit in FITS
                }
                shape = asdict(u_shape(x, y, inverted=not lowest))
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
