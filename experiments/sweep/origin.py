"""Whether stored results are of the recipe that their sweep's file holds now.

A run's key follows from its configuration, so a corrected recipe makes other runs; the exported ones stay what they
were. They are compared by meaning: settings that came later take their defaults, which the runs were made with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.config import TrainConfig
from experiments.fields import plain, read
from experiments.sweep import grid
from experiments.sweep.export import SweepResults
from experiments.sweep.keys import RunConfig, canonical
from experiments.sweep.settings import AlongSettings, AttackSettings, MeasureSettings
from hessdiag.errors import ConfigurationError

SWEEPS = Path(__file__).resolve().parent.parent / "sweeps"
Settings = dict[str, Any]  # by path, such as "train.awp.start"


def differing(results: SweepResults, sweeps: Path = SWEEPS) -> list[str]:
    """The settings in which exported runs differ from every run that the sweep's file makes of their seeds."""
    path = sweeps / f"{results.name}.toml"
    if not path.is_file():
        return []
    seeds = sorted({int(run.config.train.get("seed", 0)) for run in results.runs})
    now: dict[tuple[str, str, str], list[Settings]] = {}
    for config in grid.load(path, seeds=seeds).runs:
        now.setdefault(_place(config), []).append(_settings(config))
    found: dict[str, None] = {}
    for run in results.runs:
        try:
            mine = _settings(run.config)
        except ConfigurationError:
            found["settings that are no longer known"] = None
            continue
        others = now.get(_place(run.config))
        if others is None:
            found["which runs there are"] = None
            continue
        nearest: list[str] = min((_unequal(mine, other) for other in others), key=len)
        found |= dict.fromkeys(nearest)
    return list(found)


def remark(results: SweepResults) -> str:
    """A sentence's end for captions: empty where the results are of the recipe as it is."""
    changed = differing(results)
    if not changed:
        return ""
    rest = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
    return f" [NOT of the recipe that {results.name}.toml holds now; changed since: {', '.join(changed[:5])}{rest}]"


def _place(config: RunConfig) -> tuple[str, str, str]:
    train = config.train
    return str(train.get("method")), str(train.get("activation")), str(train.get("seed"))


def _settings(config: RunConfig) -> Settings:
    parts = {
        "train": TrainConfig.from_dict(config.train).to_dict(),
        "attack": plain(read(AttackSettings, config.attack)),
        "measure": plain(read(MeasureSettings, config.measure)),
        "along": plain(read(AlongSettings, config.along)),
    }
    settings = dict(_flat(canonical(parts), ""))
    return {**settings, "schema": config.schema}


def _flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _flat(item, f"{path}.{name}" if path else str(name))
    else:
        yield path, value


def _unequal(one: Settings, other: Settings) -> list[str]:
    return [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]
