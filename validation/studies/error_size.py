"""How large the error of E[28] = E[31] is below the top two hidden layers: by depth, width, α and β."""

from __future__ import annotations

from typing import Any

import torch

from theory import error, shapes
from validation.evidence import measured
from validation.register import Run
from validation.studies.base import Study, Table, study

BASE = {"hidden": 4, "width": 16, "beta": 1, "alpha": 14.0}


def _cases(quick: bool) -> list[tuple[str, dict[str, Any]]]:
    depths = (3, 4, 6) if quick else (3, 4, 5, 6)
    widths = (4, 16) if quick else (2, 4, 8, 16, 32, 64)
    alphas = (1.0, 14.0) if quick else (1.0, 2.0, 4.0, 7.0, 14.0, 28.0, 50.0)
    cases = [("depth", BASE | {"hidden": h}) for h in depths] + [("width", BASE | {"width": w}) for w in widths]
    return cases + [("alpha", BASE | {"alpha": a, "beta": b}) for b in (0, 1, 2) for a in alphas]


def draw(table: Table, canvas: Any) -> None:
    """Three panels: error over depth, over width, over α for each β."""
    panels = canvas.subplots(1, 3)
    for panel, varied, column in zip(panels, ("depth", "width", "alpha"), (1, 2, 4), strict=True):
        rows = [row for row in table["rows"] if row[0] == varied]
        for beta in sorted({row[3] for row in rows}):
            chosen = [row for row in rows if row[3] == beta]
            panel.errorbar(
                [row[column] for row in chosen],
                [row[5] for row in chosen],
                [row[6] for row in chosen],
                marker="o",
                capsize=3,
                label=f"β = {beta}",
            )
        panel.set_xlabel({"depth": "hidden layers", "width": "width", "alpha": "α"}[varied])
        panel.set_ylim(0)
        panel.grid(alpha=0.3)
    panels[1].set_xscale("log", base=2)
    panels[2].set_xscale("log")
    panels[2].legend()
    panels[0].set_ylabel("relative error of D, layers below the top two")


@study("error_size", draw=draw)
def run(options: Run) -> Study:
    """Random nets with weights N(0, 1/fan-in), inputs and cotangents standard normal."""
    nets, samples = (6, 16) if options.quick else (20, 64)
    rows = []
    for varied, case in _cases(options.quick):
        g = torch.Generator().manual_seed(0)
        shape = shapes.rct(case["alpha"], case["beta"])
        found = error.study(shape, hidden=case["hidden"], width=case["width"], generator=g, nets=nets, samples=samples)
        ratio = case["alpha"] * 2.0 ** (case["beta"] - 2)
        rows.append((varied, case["hidden"], case["width"], case["beta"], case["alpha"], found.overall,
                     found.standard_error, ratio, max(found.by_layer[-2:]), nets))  # fmt: skip
    values = [row[5] for row in rows if row[2] > 1]
    findings = (
        measured("largest error in the top two hidden layers", max(row[8] for row in rows), at_most=1e-10),
        measured("smallest error below them", min(values), at_least=1e-3, label="relative error"),
    )
    columns = ("varied", "hidden layers", "width", "β", "α", "relative error", "standard error", "max|σ''|",
               "error in the top two", "nets")  # fmt: skip
    return Study("error_size", "Relative error of the paper's D (E[28], E[31]) below the top two hidden layers",
                 columns, tuple(rows), findings,
                 ("‖D_paper - D‖/‖D‖ pooled over the layers l <= L-3; standard error over nets",))  # fmt: skip
