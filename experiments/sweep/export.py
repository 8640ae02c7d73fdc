"""Results as files fit for a repository: one JSON per sweep, a line per run, checked when read.

A run's configuration travels with its numbers, and its key must be the hash of that configuration: what was
edited by hand, or mixed from different experiments, is refused.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.fields import storable
from experiments.sweep.keys import TIERS, RunConfig
from experiments.sweep.reader import DAMAGED, FAILED, Reader
from experiments.sweep.seals import SEAL, DamagedError, sealed, unsealed
from experiments.sweep.store import Store
from hessdiag.errors import ConfigurationError, StoreError
from hessdiag.show.text import counted
from hessdiag.store.files import BadFileError, read_json, replace_file

FORMAT = "hessdiag-sweep/1"
DIGITS = 8
MOST_TOLD = 200
"""Characters of the error of a run that failed."""
BUDGET, MAX_VALUES = 1 << 29, 20_000_000  # thousands of runs of a deep network, each with a norm for every layer


@dataclass(frozen=True)
class Result:
    """One finished run."""

    key: str
    config: RunConfig
    variant: str
    seconds: float
    record: dict[str, Any]
    sealed: bool = True  # False in an export made before its runs had a checksum


@dataclass(frozen=True)
class Failed:
    """A run whose last attempt ended with an error, such as one that diverged: there is no record of it."""

    key: str
    label: str
    error: str


@dataclass(frozen=True)
class SweepResults:
    """The finished runs of one sweep; `missing` counts those it has not done, of which some have failed."""

    name: str
    figure: str
    tier: str
    title: str
    missing: int
    runs: tuple[Result, ...]
    failed: tuple[Failed, ...] = ()

    @property
    def undone(self) -> str:
        """How many runs are missing, and how many of these failed; empty where all are there."""
        if not self.missing:
            return ""
        told = f"{counted(self.missing, 'run')} missing"
        return told + (f", {len(self.failed)} of them failed" if self.failed else "")


def rounded(value: Any) -> Any:
    """Floats to eight significant digits: more is noise, and noise makes every export a large difference."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def from_store(store: Reader, name: str) -> SweepResults:
    """What a store holds of a sweep."""
    about, rows = store.about(name), store.rows(name)
    done = [row for row in rows if row.state == "done" and row.record is not None]
    runs = tuple(
        Result(row.key, row.config, row.variant, row.seconds or math.nan, row.record or {}, row.sealed) for row in done
    )
    failed = tuple(
        _failed(row.key, row.label, (row.error or "no error told").splitlines()[0])
        for row in rows
        if row.state == FAILED
    )
    return SweepResults(name, about.figure, about.tier, about.title, len(rows) - len(runs), runs, failed)


def _failed(*told: str) -> Failed:
    """Plain text of bounded length, whatever an error or a file says."""
    return Failed(*("".join(c if c.isprintable() else " " for c in text[:MOST_TOLD]) for text in told))


def check_folder(folder: Path) -> None:
    """Refuse, before days of training, a directory in which no export could be put."""
    probe = folder / f".writable-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"1")
        probe.unlink()
    except OSError as error:
        reason = error.strerror or error
        raise ConfigurationError(f"--results {folder}: it cannot be written ({reason}); choose another") from error


def publish(store: Reader, name: str, folder: Path) -> str:
    """Export a sweep, never in place of more than the store holds; returns the line that says so."""
    found, path = from_store(store, name), folder / f"{name}.json"
    if not found.runs:
        raise StoreError(f"store {store.root}: no run of {name} is done; nothing exported")
    try:
        before = read(path).runs if path.exists() else ()
    except ConfigurationError:  # damaged, or of another format: to be written again
        before = ()
    kinds, points = {run.config.family for run in found.runs}, {_point(run) for run in found.runs}
    lost = [run for run in before if run.config.family in kinds and _point(run) not in points]
    if lost:
        raise StoreError(
            f"results {path}: holds {counted(len(lost), 'run')} of this sweep that store {store.root} does not "
            f"({lost[0].key[:8]} {lost[0].config.label}, ...); not replaced: take them over with --adopt, export to "
            "another directory with --results, or delete it"
        )
    try:
        save(found, folder)
    except OSError as error:
        raise StoreError(
            f"results {path}: cannot be written ({error.strerror or error}); nothing is lost: "
            "give the same command with --only-export and a --results that can"
        ) from error
    told = [counted(len(found.runs), "run")]
    damaged = [row for row in store.rows(name) if row.state == DAMAGED]
    told += [f"{found.missing} missing"] if found.missing else []
    rest = ", ..." if len(found.failed) > 1 else ""
    told += [f"{len(found.failed)} of them failed: {found.failed[0].key[:8]}{rest}"] if found.failed else []
    told += [f"{len(damaged)} of them damaged: {damaged[0].key[:8]}, ..."] if damaged else []
    old = sum(not run.sealed for run in found.runs)
    told += [f"{old} recorded without a checksum"] if old else []
    return f"{path} ({', '.join(told)})"


def finished(folder: Path) -> dict[str, tuple[Result, Path]]:
    """Every run that exports below `folder` hold under a checksum, by key, with the file that holds it."""
    files = ((results, folder / f"{results.name}.json") for results in read_all(folder))
    return {run.key: (run, path) for results, path in files for run in results.runs if run.sealed}


def adopt(store: Store, runs: Iterable[RunConfig], found: Mapping[str, tuple[Result, Path]]) -> list[Path]:
    """Take the results of `runs` over that exports hold and the store does not; the file of each that was taken."""
    wanted = [found[run.key] for run in runs if run.key in found]
    return [path for run, path in wanted if store.adopt(run.config, run.record, run.seconds, source=str(path))]


def _point(run: Result) -> tuple[str, str, int]:
    return run.config.family, str(run.config.train.get("activation")), int(run.config.train.get("seed", 0))


def save(results: SweepResults, folder: Path) -> Path:
    """Write `folder`/TIER/NAME.json; runs in the order of the sweep."""
    path = folder / f"{results.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = {"format": FORMAT, "name": results.name, "figure": results.figure, "tier": results.tier}
    about |= {"title": results.title, "missing": results.missing}
    about |= {"failed": [vars(run) for run in results.failed]} if results.failed else {}
    head = json.dumps(about, ensure_ascii=False)[:-1]
    lines = []
    for run in results.runs:
        entry = {"key": run.key, "variant": run.variant, "seconds": rounded(run.seconds)}
        entry |= {"config": run.config.to_dict(), "record": rounded(storable(run.record))}
        lines.append(json.dumps(sealed(entry), sort_keys=True, allow_nan=False))
    replace_file(path, (head + ', "runs": [\n' + ",\n".join(lines) + "\n]}\n").encode())
    return path


class ExportError(StoreError, ConfigurationError):
    """A file of exported results is damaged, or of another format."""


def read(path: Path) -> SweepResults:
    """Read what `save` wrote, and check every key against its configuration."""
    try:
        content = read_json(path, budget=BUDGET, values=MAX_VALUES)
        if content.get("format") != FORMAT:
            raise ExportError(f"results {path}: not of format {FORMAT}; write it with sweep --export")
        if content["tier"] not in TIERS:
            raise ExportError(f"results {path}: no tier {content['tier']!r}; export the sweep again")
        runs = tuple(_result(entry) for entry in content["runs"])
        failed = tuple(
            _failed(*(str(entry[name]) for name in ("key", "label", "error"))) for entry in content.get("failed", [])
        )
        results = SweepResults(
            content["name"], content["figure"], content["tier"], content["title"], int(content["missing"]), runs, failed
        )
    except (BadFileError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ExportError):
            raise
        raise ExportError(f"results {path}: cannot be read ({error}); export the sweep again") from error
    for run in runs:
        if run.config.key != run.key:
            raise ExportError(f"results {path}: run {run.key} is not the configuration it names; export again")
    return results


def _result(line: Any) -> Result:
    """One run of an export; DamagedError names it if its line is not what was written."""
    try:
        entry, whole = unsealed(line)
        record, _ = unsealed({key: value for key, value in entry["record"].items() if key != SEAL})
    except DamagedError as reason:
        name = line.get("key") if isinstance(line, dict) else None
        raise DamagedError(f"run {str(name)[:8]} is {reason}") from None
    seconds = float(entry["seconds"] or math.nan)
    return Result(entry["key"], RunConfig.from_dict(entry["config"]), entry.get("variant", ""), seconds, record, whole)


def read_all(folder: Path) -> list[SweepResults]:
    """Every exported sweep below `folder`, smaller tiers first."""
    order = {tier: place for place, tier in enumerate(TIERS)}
    found = [read(path) for path in sorted(folder.glob("*/*.json")) if path.parent.name in order]
    return sorted(found, key=lambda results: (order[results.tier], results.name))


def timings(results: Iterable[SweepResults]) -> list[tuple[RunConfig, float]]:
    """Configuration and seconds of every run."""
    return [(run.config, run.seconds) for sweep in results for run in sweep.runs if math.isfinite(run.seconds)]
