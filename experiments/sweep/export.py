"""Results as files fit for a repository: one JSON per sweep, a line per run, checked when read.

A run's configuration travels with its numbers, and its key must be the hash of that configuration: what was
edited by hand, or mixed from different experiments, is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.sweep.files import storable, write_whole
from experiments.sweep.keys import RunConfig
from experiments.sweep.reader import Reader
from hessdiag.errors import ConfigurationError, StoreError

FORMAT = "hessdiag-sweep/1"
DIGITS = 8


@dataclass(frozen=True)
class Result:
    """One finished run."""

    key: str
    config: RunConfig
    variant: str
    seconds: float
    record: dict[str, Any]


@dataclass(frozen=True)
class SweepResults:
    """The finished runs of one sweep; `missing` counts those it has not done."""

    name: str
    figure: str
    tier: str
    title: str
    missing: int
    runs: tuple[Result, ...]


def rounded(value: Any) -> Any:
    """Floats to eight significant digits: more is noise, and noise makes every export a large difference."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def from_store(store: Reader, name: str) -> SweepResults:
    """What a store holds of a sweep."""
    about = next((sweep for sweep in store.sweeps() if sweep["name"] == name), None)
    if about is None:
        known = ", ".join(sweep["name"] for sweep in store.sweeps()) or "none"
        raise StoreError(f"store {store.root}: no sweep {name!r}; known: {known}")
    rows = store.rows(name)
    done = [row for row in rows if row.state == "done" and row.record is not None]
    runs = tuple(Result(row.key, row.config, row.variant, row.seconds or math.nan, row.record or {}) for row in done)
    return SweepResults(name, about["figure"], about["tier"], about["title"], len(rows) - len(runs), runs)


def save(results: SweepResults, folder: Path) -> Path:
    """Write `folder`/TIER/NAME.json; runs in the order of the sweep."""
    path = folder / f"{results.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = {"format": FORMAT, "name": results.name, "figure": results.figure, "tier": results.tier}
    about |= {"title": results.title, "missing": results.missing}
    head = json.dumps(about, ensure_ascii=False)[:-1]
    lines = []
    for run in results.runs:
        entry = {"key": run.key, "variant": run.variant, "seconds": rounded(run.seconds)}
        entry |= {"config": run.config.to_dict(), "record": rounded(storable(run.record))}
        lines.append(json.dumps(entry, sort_keys=True, allow_nan=False))
    write_whole(path, (head + ', "runs": [\n' + ",\n".join(lines) + "\n]}\n").encode())
    return path


def read(path: Path) -> SweepResults:
    """Read what `save` wrote, and check every key against its configuration."""
    try:
        content = json.loads(path.read_bytes())
        if content.get("format") != FORMAT:
            raise ConfigurationError(f"results {path}: not of format {FORMAT}; write it with sweep --export")
        runs = tuple(
            Result(
                entry["key"],
                RunConfig.from_dict(entry["config"]),
                entry.get("variant", ""),
                float(entry["seconds"] or math.nan),
                entry["record"],
            )
            for entry in content["runs"]
        )
        results = SweepResults(
            content["name"], content["figure"], content["tier"], content["title"], int(content["missing"]), runs
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(f"results {path}: cannot be read ({error}); export the sweep again") from error
    for run in runs:
        if run.config.key != run.key:
            raise ConfigurationError(f"results {path}: run {run.key} is not the configuration it names; export again")
    return results


def read_all(folder: Path) -> list[SweepResults]:
    """Every exported sweep below `folder`, smaller tiers first."""
    order = {"smoke": 0, "quick": 1, "paper": 2}
    found = [read(path) for path in sorted(folder.glob("*/*.json")) if path.parent.name in order]
    return sorted(found, key=lambda results: (order[results.tier], results.name))


def timings(results: Iterable[SweepResults]) -> list[tuple[RunConfig, float]]:
    """Configuration and seconds of every run."""
    return [(run.config, run.seconds) for sweep in results for run in sweep.runs if math.isfinite(run.seconds)]
