"""A sweep as data: a TOML file becomes a list of runs.

figure = "figure3"                    # what the results draw
tier = "smoke"                        # smoke, quick, campaign or paper
title = "what is swept, in one line"

[train]                               # settings of every run, as `python -m experiments train` takes them
[attack]                              # attack settings (settings.py)
[measure]                             # measurement settings (settings.py)
[along]                               # what is recorded at chosen epochs, if anything is (settings.py)

[[grid]]                              # every combination of the lists; several grids add up
beta = [0, 1, 2]
curvature = [1, 4, 7, 10, 15]         # max|σ''|; or alpha = [...]; or activation = ["relu", "gelu"]
seed = [0]
stage = 1                             # done in this order; `--stage 1` stops after the first

[[override]]                          # change settings of the runs that match
where = { beta = 1, curvature = 7 }
attack = { aa_samples = 50 }

What a grid fixes (`train = { ... }`) goes over the sections, an override over both; tables within tables are merged.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.config import load_toml
from experiments.fields import merged
from experiments.sweep.keys import OWN, TIERS, RunConfig, canonical
from experiments.sweep.settings import complete, train_fields
from hessdiag.errors import ConfigurationError, DataError, UnknownNameError, nearest

FIGURES = ("figure3", "figure4", "figure5", "figure6", "figure7", "table1", "table2", "control", "overfitting")
NOWHERE = "none"  # the figure of a sweep that is drawn and judged nowhere
SWEEPS = Path(__file__).resolve().parent.parent / "sweeps"
SECTIONS = ("train", "attack", "measure", "along")
TOP = ("figure", "tier", "title", "note", *SECTIONS, "grid", "override")
SHAPE = ("beta", "curvature", "alpha", "activation")
MAX_RUNS, MAX_TABLES = 10_000, 200
Point = tuple[dict[str, Any], dict[str, Any]]  # what the grid varies, and what it fixes


@dataclass(frozen=True)
class Sweep:
    """The runs of one figure or table, in the order in which they are done."""

    name: str
    figure: str
    tier: str
    title: str
    runs: tuple[RunConfig, ...]
    variants: Mapping[str, str]
    later: tuple[str, ...] = ()  # keys of the runs that belong to stages left out


def find(path: str | Path) -> Path:
    """A sweep file by its path, or by its name: campaign/main is experiments/sweeps/campaign/main.toml."""
    path, named = Path(path), SWEEPS / f"{path}.toml"
    if path.exists():
        return path
    if not named.is_file():
        names = sorted(str(file.relative_to(SWEEPS).with_suffix("")) for file in SWEEPS.glob("*/*.toml"))
        hint = nearest(str(path.with_suffix("")), names)
        kind = DataError if path.suffix == ".toml" else ConfigurationError  # a file was meant, or a name
        raise kind(f"sweep {path}: no such file, and no sweep of that name; {hint}")
    return named


def load(
    path: str | Path,
    *,
    seeds: list[int] | None = None,
    stage: int | None = None,
) -> Sweep:
    """Read a sweep file, given by its path or its name; `seeds` replaces its seeds, `stage` is the last one to do."""
    path = find(path)
    table, place = load_toml(path), f"sweep {path.name}"
    _known(table, TOP, place)
    for name in SECTIONS:
        _table(table.get(name, {}), f"{place}: [{name}]")
    # A file of any name, anywhere, is a sweep: where it is none of the paper's, it is drawn and judged nowhere.
    tier = table.get("tier", path.parent.name if path.parent.name in TIERS else OWN)
    figure = table.get("figure", path.stem if path.stem in FIGURES else NOWHERE)
    _one_of(tier, TIERS, f"{place}: tier")
    _one_of(figure, (*FIGURES, NOWHERE), f"{place}: figure")
    grids, overrides = table.get("grid", []), table.get("override", [])
    if not isinstance(grids, list) or not grids:
        raise ConfigurationError(f"{place}: no [[grid]]: name at least one, with lists of what to vary")
    if not isinstance(overrides, list):
        raise ConfigurationError(f"{place}: override: write [[override]], one for each change")
    if max(len(grids), len(overrides)) > MAX_TABLES:
        raise ConfigurationError(f"{place}: more than {MAX_TABLES} grids or overrides; split it into several files")
    points: list[Point] = []
    for number, grid in enumerate(grids, start=1):
        points += _points(grid, seeds, f"{place}: grid {number}")
    # Stage by stage, and the whole of a stage with the first seed before the next.
    points.sort(key=lambda point: (point[1].get("stage", 1), point[0].get("seed", 0)))
    last = max(extra.get("stage", 1) for _, extra in points)
    if stage is not None and not 1 <= stage <= last:
        raise ConfigurationError(f"{place}: no stage {stage}: it has " + (f"1 to {last}" if last > 1 else "only one"))
    for number, override in enumerate(overrides, start=1):
        _check_override(override, table.get("train", {}), points, f"{place}: override {number}")
    runs: dict[str, RunConfig] = {}
    variants: dict[str, str] = {}
    early: set[str] = set()
    used = [0] * len(overrides)
    for axes, extra in points:
        sections = {name: merged(table.get(name, {}), extra.get(name, {})) for name in SECTIONS}
        for index, override in enumerate(overrides):
            if _matches(override["where"], {**sections["train"], **axes}, f"{place}: override {index + 1}"):
                used[index] += 1
                sections = {name: merged(sections[name], override.get(name, {})) for name in SECTIONS}
        run, variant = _run(sections, axes, place), extra.get("variant", "")
        if variants.setdefault(run.key, variant) != variant:
            raise ConfigurationError(
                f"{place}: variants {variants[run.key]!r} and {variant!r} are the same run ({run.label}); "
                "give them different settings or one name"
            )
        runs[run.key] = run
        if stage is None or extra.get("stage", 1) <= stage:
            early.add(run.key)
    for index, count in enumerate(used):
        if not count and seeds is None:
            raise ConfigurationError(f"{place}: override {index + 1} matches no run; correct its `where`")
    title = str(table.get("title", path.stem))
    chosen, later = (tuple(run for run in runs.values() if (run.key in early) is wanted) for wanted in (True, False))
    return Sweep(f"{tier}/{path.stem}", figure, tier, title, chosen, variants, tuple(run.key for run in later))


def _table(table: Any, where: str) -> None:
    if not isinstance(table, Mapping):
        raise ConfigurationError(f"{where}: expected a table of settings, found {table!r}")


def _known(table: Any, known: tuple[str, ...] | list[str], where: str) -> None:
    _table(table, where)
    for key in table:
        if key not in known:
            raise UnknownNameError(f"{where}: unknown key {key!r}; {nearest(key, list(known))}")


def _one_of(value: Any, known: tuple[str, ...], where: str) -> None:
    if value not in known:
        raise UnknownNameError(f"{where} {value!r}; {nearest(str(value), list(known))}")


def _points(grid: Any, seeds: list[int] | None, where: str) -> list[Point]:
    """Every combination of a grid's lists, with its fixed extras."""
    _known(grid, (*SHAPE, "stage", "variant", *SECTIONS, *train_fields()), where)
    extra = {name: grid[name] for name in ("stage", "variant", *SECTIONS) if name in grid}
    stage = extra.get("stage", 1)
    if not isinstance(stage, int) or isinstance(stage, bool) or stage < 1:
        raise ConfigurationError(f"{where}: stage must be a whole number from 1 on, not {stage!r}")
    if not isinstance(extra.get("variant", ""), str):
        raise ConfigurationError(f"{where}: variant must be text, not {extra['variant']!r}; write one grid per variant")
    for name in SECTIONS:
        _table(extra.get(name, {}), f"{where}: {name}")
    axes = {name: value if isinstance(value, list) else [value] for name, value in grid.items() if name not in extra}
    if seeds is not None:
        axes["seed"] = list(seeds)
    for name, values in axes.items():
        if not values:
            raise ConfigurationError(f"{where}: {name} is empty; give at least one value")
        if name in extra.get("train", {}):
            raise ConfigurationError(f"{where}: {name} is given twice, by itself and in train; give it once")
    for value in axes.get("seed", ()):
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigurationError(f"{where}: seed must be a whole number, not {value!r}")
    shaped = {name for name in SHAPE if name in axes}
    if shaped not in ({"activation"}, {"beta", "curvature"}, {"beta", "alpha"}):
        raise ConfigurationError(
            f"{where}: say which activations by `activation`, or by `beta` with `curvature` or `alpha`"
            + (f"; found {', '.join(sorted(shaped))}" if shaped else "")
        )
    count = math.prod(len(values) for values in axes.values())
    if count > MAX_RUNS:
        raise ConfigurationError(f"{where}: {count} combinations; the limit is {MAX_RUNS}: split it into several files")
    names = list(axes)
    return [(dict(zip(names, values, strict=True)), extra) for values in itertools.product(*axes.values())]


def _check_override(override: Any, train: Mapping[str, Any], points: list[Point], place: str) -> None:
    """Refuse what could match no run for its spelling, or change what the grid varies."""
    _known(override, ("where", *SECTIONS), place)
    where = override.get("where")
    if not isinstance(where, Mapping) or not where:
        raise ConfigurationError(f"{place}: needs where = {{ ... }} with what it applies to")
    for name in SECTIONS:
        _table(override.get(name, {}), f"{place}: {name}")
    if not any(override.get(name) for name in SECTIONS):
        raise ConfigurationError(f"{place}: changes nothing; give train, attack, measure or along = {{ ... }}")
    varied = {name for axes, _ in points for name in axes}
    given = varied | set(train) | {name for _, extra in points for name in extra.get("train", {})}
    for name in where:
        if name not in given:
            known = nearest(name, sorted(given))
            raise UnknownNameError(f"{place}: neither a grid nor [train] gives {name!r}; {known}")
    for name in override.get("train", {}):
        if name in varied | {"activation"}:
            raise ConfigurationError(f"{place}: train.{name} is the grid's to say; write a further [[grid]] instead")


def _matches(where: Mapping[str, Any], run: Mapping[str, Any], place: str) -> bool:
    for name, wanted in where.items():
        values = wanted if isinstance(wanted, list) else [wanted]
        allowed = [canonical(value, where=f"{place}: where.{name}") for value in values]
        if name not in run or canonical(run[name], where=f"{place}: {name}") not in allowed:
            return False
    return True


def _run(
    sections: dict[str, dict[str, Any]],
    axes: dict[str, Any],
    where: str,
) -> RunConfig:
    train = {**sections["train"], **{name: value for name, value in axes.items() if name not in SHAPE}}
    if "activation" in axes:
        train["activation"] = axes["activation"]
    else:
        shape = "curvature" if "curvature" in axes else "alpha"
        train["activation"] = f"rct:beta={axes['beta']},{shape}={axes[shape]}"
    try:
        return complete(RunConfig(train, sections["attack"], sections["measure"], along=sections["along"]))
    except ConfigurationError as error:
        raise type(error)(f"{where}: {error}") from error
