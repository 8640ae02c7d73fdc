"""Every figure and table from the stored results, and a list of what there is and what is missing."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.correlation.closer import curves
from experiments.correlation.report import analyse
from experiments.correlation.rows import Row, rows
from experiments.correlation.sources import command
from experiments.correlation.verdicts import Verdict, load_rules, shared_rules, verdicts
from experiments.fields import storable
from experiments.figures.closed_forms import figure1, figure2
from experiments.figures.curves import DRAWINGS, counted
from experiments.figures.epochs import overfitting
from experiments.figures.extras import control, has_angles, heat_map, norms, scatter
from experiments.figures.numbers import numbers
from experiments.figures.tables import table1, table2
from experiments.sweep import origin
from experiments.sweep.export import SweepResults, read_all, rounded
from hessdiag.store.files import replace_file

Drawing = Callable[[SweepResults, Sequence[Row], Path], None]
TITLES = {
    "figure1": "Figure 1. RCT-AF for several α",
    "figure2": "Figure 2. Its second derivative",
    "figure3": "Figure 3. Robustness over α and over max|σ''|",
    "figure4": "Figure 4. Two architectures",
    "figure5": "Figure 5. Three training methods",
    "figure6": "Figure 6. Harder data",
    "figure7": "Figure 7. Norm of the Hessian's diagonal, and clean accuracy, after standard training",
    "table1": "Table 1. Activations",
    "table2": "Table 2. What an activation costs",
    "control": "Control. One factor of α at a time (not in the paper)",
    "overfitting": "Robust overfitting, and the noise of a training step meanwhile (not in the paper)",
    "norms": "Norms of both losses, and whether their parts add up (not in the paper)",
    "scatter": "Norm against robustness (not in the paper)",
    "heat": "Norm by layer (not in the paper)",
}
SWEPT: dict[str, Drawing] = {
    **DRAWINGS,
    "table1": table1,
    "table2": table2,
    "control": control,
    "overfitting": overfitting,
}


@dataclass(frozen=True)
class Picture:
    """One drawing: files `path`.png and .svg below the results' directory; or, without a path, what makes
    it.
    """

    figure: str
    tier: str
    title: str
    caption: str
    path: Path | None
    command: str = ""
    missing: str = ""
    """What would complete it, where runs are missing."""


@dataclass(frozen=True)
class Built:
    """Everything that one pass over the results made."""

    pictures: tuple[Picture, ...]
    verdicts: dict[str, Verdict]
    analyses: dict[str, Any]


def build(results: Path, out: Path, *, resamples: int | None = None) -> Built:
    """Draw what `results` allows into `out`, and write the analysis and the verdicts beside the results."""
    sweeps = read_all(results)
    table = load_rules()
    if resamples is not None:
        table["resamples"] = resamples
    rules = shared_rules(table)
    pictures = _closed(out)
    analyses: dict[str, Any] = {}
    looks: dict[str, Any] = {}
    for figure, drawing in SWEPT.items():
        found = [sweep for sweep in sweeps if sweep.figure == figure and sweep.runs]
        for stored in found:
            sweep = replace(stored, title=stored.title + origin.remark(stored))
            chosen = rows(sweep)
            name = sweep.name.rpartition("/")[2]
            if figure == "control" and has_angles(chosen):
                numbers(sweep, chosen, out / f"{name}_{sweep.tier}")
            pictures.append(_draw(drawing, figure, sweep, chosen, out / f"{name}_{sweep.tier}"))
            if figure in DRAWINGS:
                margin = float(table["delta"]["accuracy"])
                if look := curves(chosen, rules):
                    looks[sweep.name] = look
                analyses[sweep.name] = analyse(
                    chosen, margin=margin, resamples=int(table["resamples"]), seed=table["seed"]
                )
            if figure in DRAWINGS and has_angles(chosen):
                numbers(sweep, chosen, out / f"{name}_norms_{sweep.tier}")
                pictures.append(_draw(norms, "norms", sweep, chosen, out / f"{name}_norms_{sweep.tier}"))
            if figure in ("figure3", "figure7"):
                pictures.append(_draw(scatter, "scatter", sweep, chosen, out / f"{name}_scatter_{sweep.tier}"))
                pictures.append(_draw(heat_map, "heat", sweep, chosen, out / f"{name}_heat_{sweep.tier}"))
        if not found:
            pictures.append(Picture(figure, "", TITLES[figure], "no results yet", None, command(figure)))
    judged = verdicts(sweeps, rules=table)
    _write(results / "verdicts.json", {name: verdict.to_dict() for name, verdict in judged.items()})
    _write(results / "analysis.json", analyses)
    _write(results / "closer.json", looks)
    return Built(tuple(pictures), judged, analyses)


def _closed(out: Path) -> list[Picture]:
    pictures = []
    for name, drawing in (("figure1", figure1), ("figure2", figure2)):
        drawing(out / name)
        pictures.append(Picture(name, "closed form", TITLES[name], "closed forms; nothing is trained", out / name))
    return pictures


def _draw(drawing: Drawing, figure: str, sweep: SweepResults, chosen: Sequence[Row], path: Path) -> Picture:
    drawing(sweep, chosen, path)
    seeds = sorted({row.seed for row in chosen})
    caption = f"tier {sweep.tier}: {sweep.title}; {len(chosen)} runs, {counted(seeds)}"
    missing = ""
    if sweep.missing:
        given = "" if sweep.tier == "campaign" else f"--seeds {','.join(map(str, seeds))} "  # its files name theirs
        given += "--retries 1 " if sweep.failed else ""
        missing = f"{sweep.undone}: python -m experiments sweep experiments/sweeps/{sweep.name}.toml {given}--export"
    return Picture(figure, sweep.tier, TITLES[figure], caption, path, missing=missing)


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(rounded(storable(value)), indent=1, ensure_ascii=False, sort_keys=True, allow_nan=False)
    replace_file(path, (text + "\n").encode())
