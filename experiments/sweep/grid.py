"""A sweep as data: a TOML file becomes a list of runs.

figure = "figure3"                    # what the results draw
tier = "smoke"                        # smoke, quick or paper
title = "what is swept, in one line"

[train]                               # settings of every run, as `python -m experiments train` takes them
[attack]                              # attack settings (settings.py)
[measure]                             # measurement settings (settings.py)

[[grid]]                              # every combination of the lists; several grids add up
beta = [0, 1, 2]
curvature = [1, 4, 7, 10, 15]         # max|σ''|; or alpha = [...]; or activation = ["relu", "gelu"]
seed = [0]

[[override]]                          # change settings of the runs that match
where = { beta = 1, curvature = 7 }
attack = { aa_samples = 50 }
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.sweep.keys import RunConfig, canonical
from experiments.sweep.settings import complete, train_fields
from hessdiag.errors import ConfigurationError, UnknownNameError, nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TIERS = ("smoke", "quick", "paper")
FIGURES = ("figure3", "figure4", "figure5", "figure6", "figure7", "table1", "table2", "control")
TOP = ("figure", "tier", "title", "note", "train", "attack", "measure", "grid", "override")
SECTIONS = ("train", "attack", "measure")
SHAPE = ("beta", "curvature", "alpha", "activation")


@dataclass(frozen=True)
class Sweep:
    """The runs of one figure or table, in the order in which they are done."""

    name: str
    figure: str
    tier: str
    title: str
    runs: tuple[RunConfig, ...]
    variants: Mapping[str, str]
    note: str = ""


def load(
    path: str | Path, *, seeds: list[int] | None = None, complete: Callable[[RunConfig], RunConfig] = complete
) -> Sweep:
    """Read a sweep file; `seeds` replaces its seeds."""
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigurationError(f"sweep {path}: no such file; experiments/sweeps holds one per figure") from error
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"sweep {path}: {error}") from error
    _known(table, TOP, f"sweep {path.name}")
    tier, figure = table.get("tier", path.parent.name), table.get("figure", path.stem)
    _one_of(tier, TIERS, f"sweep {path.name}: tier")
    _one_of(figure, FIGURES, f"sweep {path.name}: figure")
    grids, overrides = table.get("grid", []), table.get("override", [])
    if not isinstance(grids, list) or not grids:
        raise ConfigurationError(f"sweep {path.name}: no [[grid]]: name at least one, with lists of what to vary")
    points: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for number, grid in enumerate(grids, start=1):
        points += _points(grid, seeds, f"sweep {path.name}: grid {number}")
    points.sort(key=lambda point: point[0].get("seed", 0))  # a whole sweep with the first seed before the next
    runs: dict[str, RunConfig] = {}
    variants: dict[str, str] = {}
    used = [0] * len(overrides)
    for axes, extra in points:
        sections = {name: {**table.get(name, {}), **extra.get(name, {})} for name in SECTIONS}
        for index, override in enumerate(overrides):
            where = f"sweep {path.name}: override {index + 1}"
            _known(override, ("where", *SECTIONS), where)
            if _matches(override.get("where", {}), {**sections["train"], **axes}, where):
                used[index] += 1
                for name in SECTIONS:
                    sections[name].update(override.get(name, {}))
        run = _run(sections, axes, f"sweep {path.name}", complete)
        runs[run.key] = run
        variants[run.key] = str(extra.get("variant", ""))
    for index, count in enumerate(used):
        if not count and seeds is None:
            raise ConfigurationError(f"sweep {path.name}: override {index + 1} matches no run; correct its `where`")
    title = str(table.get("title", path.stem))
    return Sweep(f"{tier}/{path.stem}", figure, tier, title, tuple(runs.values()), variants, str(table.get("note", "")))


def _known(table: Any, known: tuple[str, ...] | list[str], where: str) -> None:
    if not isinstance(table, Mapping):
        raise ConfigurationError(f"{where}: expected a table of settings, found {type(table).__name__}")
    for key in table:
        if key not in known:
            raise UnknownNameError(f"{where}: unknown key {key!r}; {nearest(key, list(known))}")


def _one_of(value: Any, known: tuple[str, ...], where: str) -> None:
    if value not in known:
        raise UnknownNameError(f"{where} {value!r}; {nearest(str(value), list(known))}")


def _points(grid: Any, seeds: list[int] | None, where: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Every combination of a grid's lists, with its fixed extras."""
    _known(grid, (*SHAPE, "variant", *SECTIONS, *train_fields()), where)
    extra = {name: grid[name] for name in ("variant", *SECTIONS) if name in grid}
    axes = {name: value if isinstance(value, list) else [value] for name, value in grid.items() if name not in extra}
    if seeds is not None:
        axes["seed"] = list(seeds)
    for name, values in axes.items():
        if not values:
            raise ConfigurationError(f"{where}: {name} is empty; give at least one value")
    shaped = {name for name in SHAPE if name in axes}
    if shaped not in ({"activation"}, {"beta", "curvature"}, {"beta", "alpha"}):
        raise ConfigurationError(
            f"{where}: say which activations by `activation`, or by `beta` with `curvature` or `alpha`"
            + (f"; found {', '.join(sorted(shaped))}" if shaped else "")
        )
    names = list(axes)
    return [(dict(zip(names, values, strict=True)), extra) for values in itertools.product(*axes.values())]


def _matches(where: Any, run: Mapping[str, Any], place: str) -> bool:
    if not isinstance(where, Mapping) or not where:
        raise ConfigurationError(f"{place}: needs where = {{ ... }} with what it applies to")
    for name, wanted in where.items():
        if name not in run:
            raise UnknownNameError(f"{place}: no run has {name!r}; {nearest(name, sorted(run))}")
        values = wanted if isinstance(wanted, list) else [wanted]
        if canonical(run[name]) not in [canonical(value) for value in values]:
            return False
    return True


def _run(
    sections: dict[str, dict[str, Any]],
    axes: dict[str, Any],
    where: str,
    complete: Callable[[RunConfig], RunConfig],
) -> RunConfig:
    train = {**sections["train"], **{name: value for name, value in axes.items() if name not in SHAPE}}
    if "activation" in axes:
        train["activation"] = axes["activation"]
    else:
        shape = "curvature" if "curvature" in axes else "alpha"
        train["activation"] = f"rct:beta={axes['beta']},{shape}={axes[shape]}"
    try:
        return complete(RunConfig(train, sections["attack"], sections["measure"]))
    except ConfigurationError as error:
        raise type(error)(f"{where}: {error}") from error
