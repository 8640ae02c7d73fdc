"""What stored runs say of the coordinates: |γ|, effective curvature, the control, and whether the two parts add.

Read from `results/<tier>/<sweep>.json` (`python -m experiments sweep ... --export`); nothing is trained. From the rms
of the diagonal T, of its Gauss-Newton part G and of its functional part F the cosine is (T² - G² - F²) / 2GF.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.sweep.keys import TIERS
from hessdiag.errors import DataError
from validation.register import Run
from validation.studies.base import Cell, Study, study

Record = dict[str, Any]
Row = tuple[Cell, ...]
PLACES = ("train/clean", "train/adversarial")


def exports(results: Path) -> list[Path]:
    """The committed sweeps of every tier, smallest first."""
    return [path for tier in TIERS for path in sorted((results / tier).glob("*.json"))]


def runs(path: Path) -> list[Record]:
    """Configuration and record of every run of a sweep."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["runs"]
        return [run for run in found if run["record"] and run["config"]["train"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: no export of a sweep ({type(error).__name__}: {error}); export it anew") from None


def gains(record: Record) -> list[float]:
    """Mean |γ| of each BatchNorm that feeds an activation: effective curvature over max|σ''|."""
    layers = record.get("effective_curvature") or ()
    return [
        layer["mean"] / layer["max_curvature"]
        for layer in layers
        if isinstance(layer.get("mean"), float) and isinstance(layer.get("max_curvature"), float | int)
    ]


def cosine(record: Record, place: str) -> float | None:
    """Of the Gauss-Newton and the functional part, None where the run has no such norm."""
    norm = (record.get("norms") or {}).get(place) or {}
    total, outer, bend = (
        float(part.get("rms") or math.nan)
        for part in (norm, norm.get("gauss_newton") or {}, norm.get("functional") or {})
    )
    if not (total > 0 and outer > 0 and bend > 0):
        return None
    return float((total**2 - outer**2 - bend**2) / (2 * outer * bend))


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _band(run: Record) -> str:
    """Below 4, in 4 to 10, or above; "" at a kink."""
    value = run["record"].get("max_curvature")
    if not isinstance(value, float | int):
        return ""
    return "< 4" if value < 4 else "4 to 10" if value <= 10 else "> 10"


def _settings(found: list[Record]) -> Iterator[tuple[str, str, list[Record]]]:
    """Runs by training method, and within it by max|σ''|."""
    for method in sorted({str(run["config"]["train"]["method"]) for run in found}):
        for band in ("< 4", "4 to 10", "> 10"):
            chosen = [run for run in found if run["config"]["train"]["method"] == method and _band(run) == band]
            if chosen:
                yield method, band, chosen


def _label(train: Record) -> str:
    control = train.get("control") or {}
    as_alpha = control.get("as_alpha")
    if as_alpha is None:
        return f"{train['activation']}"
    factors = ", ".join(control.get("factors") or ())
    return f"{train['activation']} trained as α = {as_alpha:g} ({factors})"


def _mean(values: list[Any]) -> float | None:
    numbers = [float(v) for v in values if isinstance(v, float | int) and math.isfinite(v)]
    return statistics.fmean(numbers) if numbers else None


def control_rows(path: Path) -> list[Row]:
    """One row for each arm of the control: means over its seeds."""
    arms: dict[str, list[Record]] = {}
    for run in runs(path):
        arms.setdefault(_label(run["config"]["train"]), []).append(run["record"])
    rows: list[Row] = []
    for arm, records in arms.items():
        norms = [(r.get("norms") or {}) for r in records]
        rows.append(
            (
                f"{path.parent.name}/{path.stem}", "", arm, len(records),
                _median([g for r in records for g in gains(r)]),
                _mean([(r.get("aa2") or {}).get("value") for r in records]),
                *(_mean([(n.get(place) or {}).get("rms") for n in norms]) for place in PLACES),
                *(_median([c for r in records if (c := cosine(r, place)) is not None]) for place in PLACES),
            )
        )  # fmt: skip
    return rows


@study("stored", reads_results=True)
def run(options: Run) -> Study:
    """Every committed sweep by method and range of max|σ''|, and the control arm by arm."""
    rows: list[Row] = []
    signs: dict[tuple[str, str], dict[str, float]] = {}
    for path in exports(options.results):
        if path.stem.startswith("control"):
            rows += control_rows(path)
            continue
        for method, band, found in _settings(runs(path)):
            records = [run["record"] for run in found]
            cosines = {p: [c for r in records if (c := cosine(r, p)) is not None] for p in PLACES}
            if not any(gains(r) for r in records) and not any(cosines.values()):
                continue
            for place in PLACES:  # by run: some belong to two sweeps
                known = {run["key"]: c for run in found if (c := cosine(run["record"], place)) is not None}
                signs.setdefault((path.parent.name, place), {}).update(known)
            rows.append(
                (
                    f"{path.parent.name}/{path.stem}", method, f"max|σ''| {band}", len(records),
                    _median([g for r in records for g in gains(r)]),
                    _mean([(r.get("aa2") or {}).get("value") for r in records]),
                    *(_mean([((r.get("norms") or {}).get(p) or {}).get("rms") for r in records]) for p in PLACES),
                    *(_median(cosines[p]) for p in PLACES),
                )
            )  # fmt: skip
    columns = (
        "sweep", "method", "curvature or arm", "runs", "median |γ|", "mean robust accuracy (AA-2)", "mean norm, clean",
        "mean norm, adversarial", "median cosine, clean", "median cosine, adversarial",
    )  # fmt: skip
    shares = [
        f"{tier}, {place.split('/')[1]} loss: {sum(c > 0 for c in known.values())} of {len(known)}"
        for (tier, place), known in signs.items()
    ]
    notes = (
        "|γ|: gains of the BatchNorms that feed an activation, medians over layers and runs; |γ| max|σ''| is the "
        "effective curvature. Norms are rms (right side of E[8]) on training images.",
        f"Runs with a positive cosine, without the control: {'; '.join(shares)}.",
    )
    return Study("stored", "Stored runs: gains, effective curvature, the control, parts that add or cancel", columns,
                 tuple(rows), (), notes)  # fmt: skip
