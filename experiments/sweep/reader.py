"""What a store knows, for those who only ask: sweeps, runs, how each stands.

store.json                 the form of the store
sweeps/TIER/NAME.json      a sweep: its runs with key, place, variant and whole configuration
runs/KEY/                  a run: who holds it, how often it was tried, what came out (see `files`)
logs/                      what the workers said

How a run stands follows from its directory: done where there is a result, running where its lock is held, failed where
its last attempt ended so, queued otherwise.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.sweep import former
from experiments.sweep.files import RESULT, Attempt, GoneError, held, read_attempts, read_result
from experiments.sweep.keys import RunConfig
from experiments.sweep.seals import DamagedError
from hessdiag.errors import StoreError, nearest
from hessdiag.store.files import BadFileError, read_json, shown

FORM, MARK = "hessdiag-store/3", "store.json"
BUDGET, MAX_VALUES = 1 << 28, 8_000_000  # ten thousand configurations
DONE, RUNNING, QUEUED, FAILED = STATES = ("done", "running", "queued", "failed")
DAMAGED = "damaged"
"""The state of a row that is not what was written."""


@dataclass(frozen=True)
class Member:
    """One run as a sweep names it; `config` is None where it is not the one of its key."""

    key: str
    position: int
    variant: str
    config: RunConfig | None

    def to_dict(self) -> dict[str, Any]:
        """As the sweep's file holds it."""
        assert self.config is not None
        return {**vars(self), "config": self.config.to_dict()}


@dataclass(frozen=True)
class Registered:
    """A sweep that a store knows."""

    name: str
    tier: str
    figure: str
    title: str
    added: float
    members: tuple[Member, ...]


@dataclass(frozen=True)
class Row:
    """One run as the store knows it."""

    key: str
    config: RunConfig
    state: str
    variant: str = ""
    failures: int = 0
    attempt: int = 0
    worker: str = ""
    started: float | None = None
    seconds: float | None = None
    error: str | None = None
    record: dict[str, Any] | None = None
    sealed: bool = True  # False for a record written before records had a checksum

    @property
    def label(self) -> str:
        """One line for tables."""
        return self.config.label


class Reader:
    """A store opened for reading: nothing in it changes."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.former = not (self.root / MARK).exists() and (self.root / former.NAME).is_file()
        if not self.former:
            check_form(self.root)
        self._mark = self._which()
        self._read: dict[Path, tuple[Any, Registered]] = {}
        self._seen: dict[str, tuple[Any, Row]] = {}

    def folder(self, key: str) -> Path:
        """Where a run keeps its files."""
        return self.root / "runs" / key

    def here(self) -> None:
        """GoneError if the store that was opened is no longer the one of that name: what is written to it is lost."""
        if self._which() != self._mark:
            raise GoneError(self.root)

    def _which(self) -> Any:
        with contextlib.suppress(OSError):
            return _stamp(self.root / (former.NAME if self.former else MARK))[0]

    # sweeps

    def sweeps(self) -> list[Registered]:
        """All sweeps, in the order in which they came."""
        if self.former:
            found = [_registered(sweep) for sweep in former.sweeps(self.root)]
        else:
            found = [self._sweep(path) for path in (self.root / "sweeps").rglob("*.json")]
        return sorted(found, key=lambda sweep: (sweep.added, sweep.name))

    def about(self, name: str) -> Registered:
        """One sweep, which must be there."""
        path = self._path(name)
        if not self.former and path.exists():
            return self._sweep(path)
        known = {sweep.name: sweep for sweep in self.sweeps()}
        if name not in known:
            there = nearest(name, list(known)) if known else "it holds none"
            raise StoreError(f"store {self.root}: no sweep {name!r}; {there}")
        return known[name]

    def members(self, sweep: str | None = None) -> list[Member]:
        """The runs of one sweep in its order, or of all, each once."""
        self.here()
        if sweep is not None:
            return list(self.about(sweep).members)
        found: dict[str, Member] = {}
        for one in self.sweeps():
            for member in one.members:
                found.setdefault(member.key, member)
        return list(found.values())

    def _path(self, name: str) -> Path:
        return self.root / "sweeps" / f"{name}.json"

    def _sweep(self, path: Path) -> Registered:
        """A sweep's file, read again when it has changed."""
        try:
            stamp = _stamp(path)
            if path not in self._read or self._read[path][0] != stamp:
                self._read[path] = stamp, _registered(read_json(path, budget=BUDGET, values=MAX_VALUES))
        except (BadFileError, OSError, KeyError, TypeError, ValueError, AttributeError) as reason:
            advice = "give the sweep's command again: it is written anew, and what is finished in runs/ is kept"
            raise StoreError(f"store {path}: damaged ({shown(str(reason))}); {advice}") from None
        return self._read[path][1]

    # runs

    def rows(self, sweep: str | None = None, *, records: bool = True) -> list[Row]:
        """All runs, or those of one sweep, in its order; `records` False leaves out what they recorded."""
        return [self._row(member, records=records) for member in self.members(sweep)]

    def _row(self, member: Member, *, records: bool) -> Row:
        if member.config is None:
            reason = "damaged: its configuration is not the one that its key names"
            return Row(member.key, RunConfig({}), DAMAGED, member.variant, error=reason)
        folder = self.folder(member.key)
        state, attempts = self.standing(member.key)[0], read_attempts(folder)
        last = attempts[-1] if attempts else {}
        row = {
            "variant": member.variant, "failures": failures(attempts), "attempt": len(attempts),
            "worker": last.get("worker", ""), "started": last.get("started"), "error": last.get("error"),
        }  # fmt: skip
        if state != DONE:
            return Row(member.key, member.config, state, **row)
        stamp = (_stamp(folder / RESULT), member.variant)
        if not records and self._seen.get(member.key, (None,))[0] == stamp:
            return self._seen[member.key][1]
        record, seconds, whole, row["error"] = None, None, True, None
        try:
            record, seconds, whole = read_result(folder, member.config)
        except DamagedError as reason:
            state, row["error"] = DAMAGED, str(reason)
        found = Row(member.key, member.config, state, seconds=seconds, sealed=whole, **row)
        self._seen[member.key] = stamp, found
        return dataclasses.replace(found, record=record) if records else found

    def standing(self, key: str) -> tuple[str, list[Attempt]]:
        """How a run stands, with its history where it is not done; a result that is there counts, whole or not."""
        folder = self.folder(key)
        result = folder / RESULT
        if result.exists():
            return DONE, []
        busy, attempts = held(folder), read_attempts(folder)
        if result.exists():  # come meanwhile
            return DONE, []
        return RUNNING if busy else FAILED if failed(attempts) else QUEUED, attempts

    def attempts(self, key: str) -> list[Attempt]:
        """The history of one run: each attempt's outcome is done, failed, released or interrupted, None under way."""
        state, attempts = self.standing(key)[0], read_attempts(self.folder(key))
        if attempts and (state == DONE or (state == RUNNING and attempts[-1]["outcome"] is None)):
            return [*settled(attempts[:-1]), {**attempts[-1], "outcome": DONE if state == DONE else None}]
        return settled(attempts)

    def counts(self, sweep: str | None = None) -> dict[str, int]:
        """How many runs are in each state; one that can no longer be told what it is has failed."""
        found = Counter(self._state(member) for member in self.members(sweep))
        return {state: found[state] for state in STATES}

    def _state(self, member: Member) -> str:
        return FAILED if member.config is None else self.standing(member.key)[0]

    def chosen(
        self, sweep: str | None = None, *, seeds: Collection[int] | None = None, first: int | None = None
    ) -> Iterator[tuple[str, RunConfig]]:
        """Key and configuration of the runs with these seeds, among the sweep's first so many."""
        for member in self.members(sweep):
            early = sweep is None or first is None or member.position < first
            if member.config is not None and early and (seeds is None or member.config.train.get("seed") in seeds):
                yield member.key, member.config

    def remaining(
        self, sweep: str | None = None, *, seeds: Collection[int] | None = None, first: int | None = None,
        retries: int = 0,
    ) -> int:  # fmt: skip
        """How many of the chosen runs are not settled: queued, running, or failed with a retry left."""
        found = (self.standing(key) for key, _ in self.chosen(sweep, seeds=seeds, first=first))
        return sum(state != DONE and (state != FAILED or failures(tried) <= retries) for state, tried in found)

    def claimed(self, sweep: str) -> int:
        """How often a run of this sweep has been taken up."""
        return sum(len(read_attempts(self.folder(key))) for key, _ in self.chosen(sweep))


def check_form(root: Path) -> None:
    """Refuse a directory that is no store, or one of a form that this code does not know."""
    path = root / MARK
    if not path.exists():
        raise StoreError(f"store {root}: there is none; `python -m experiments sweep FILE --store {root}` makes one")
    try:
        content = read_json(path)
    except BadFileError as reason:
        raise StoreError(f"store {path}: {reason}; choose another directory with --store") from None
    form = content.get("form") if isinstance(content, dict) else None
    if form != FORM:
        raise StoreError(
            f"store {path}: form {shown(form)}, where this code knows {FORM}; update the code, or choose another "
            "directory with --store"
        )


def settled(attempts: list[Attempt]) -> list[Attempt]:
    """The history of a run that nobody holds: what did not end by itself was interrupted."""
    return [{**attempt, "outcome": attempt["outcome"] or "interrupted"} for attempt in attempts]


def failed(attempts: list[Attempt]) -> bool:
    """Whether the last attempt ended with an error."""
    return bool(attempts) and attempts[-1]["outcome"] == FAILED


def failures(attempts: list[Attempt]) -> int:
    """How often a run has failed."""
    return sum(attempt["outcome"] == FAILED for attempt in attempts)


def _registered(content: dict[str, Any]) -> Registered:
    members = [_member(entry) for entry in content["runs"]]
    about = {name: str(content[name]) for name in ("name", "tier", "figure", "title")}
    members.sort(key=lambda member: member.position)
    return Registered(**about, added=float(content["added"]), members=tuple(members))


def _member(entry: dict[str, Any]) -> Member:
    key, config = str(entry["key"]), None
    try:
        config = RunConfig.from_dict(entry["config"])
        config = config if config.key == key else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        config = None
    return Member(key, int(entry["position"]), str(entry["variant"]), config)


def _stamp(path: Path) -> tuple[int, int, int]:
    facts = path.stat()
    return facts.st_ino, facts.st_mtime_ns, facts.st_size
