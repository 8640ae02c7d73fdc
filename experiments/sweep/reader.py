"""What the store knows, for those who only ask: runs, sweeps, counts, attempts."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from experiments.sweep import schema
from experiments.sweep.keys import RunConfig
from experiments.sweep.seals import DamagedError, unsealed
from hessdiag.errors import StoreError, nearest

COLUMNS = (
    "key", "config", "label", "state", "failures", "interruptions", "attempt", "owner", "lease", "started", "seconds",
    "error",
)  # fmt: skip
S = TypeVar("S", bound="Reader")
DAMAGED = "damaged"
"""The state of a row that is not what was written."""


@dataclass(frozen=True)
class Row:
    """One run as the store knows it."""

    key: str
    config: RunConfig
    label: str
    state: str
    failures: int
    interruptions: int
    attempt: int
    owner: str | None
    lease: float | None
    started: float | None
    seconds: float | None
    error: str | None
    record: dict[str, Any] | None
    variant: str = ""
    sealed: bool = True  # False for a record written before records had a checksum


class Reader:
    """A store opened for reading; `write` makes or migrates it first."""

    def __init__(self, root: str | Path, *, write: bool = False) -> None:
        self.root = Path(root)
        self.path = self.root / schema.NAME
        self._connection = schema.connect(self.root, write=write)

    def __enter__(self: S) -> S:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the database; the object is of no use afterwards."""
        self._connection.close()

    def folder(self, key: str) -> Path:
        """Where a run keeps its files."""
        return self.root / "runs" / key

    def rows(self, sweep: str | None = None, *, records: bool = True) -> list[Row]:
        """All runs, or those of one sweep, in the order in which the sweep names them; `records` False leaves out
        what they recorded, which is most of what there is to read.
        """
        columns = ", ".join(f"r.{name}" for name in COLUMNS) + (", r.record" if records else ", NULL AS record")
        if sweep is None:
            query, values = f"SELECT {columns}, '' AS variant FROM runs r ORDER BY r.rowid", tuple[str, ...]()
        else:
            members = "FROM members m JOIN runs r USING (key) WHERE m.sweep = ? ORDER BY m.position"
            query, values = f"SELECT {columns}, m.variant {members}", (sweep,)
        with schema.explained(self.path):
            return [_row(row) for row in self._connection.execute(query, values)]

    def sweeps(self) -> list[dict[str, Any]]:
        """Name, tier, figure and title of every sweep."""
        with schema.explained(self.path):
            return [dict(row) for row in self._connection.execute("SELECT * FROM sweeps ORDER BY added, name")]

    def about(self, sweep: str) -> dict[str, Any]:
        """Name, tier, figure and title of one sweep, which must be there."""
        known = {about["name"]: about for about in self.sweeps()}
        if sweep not in known:
            there = nearest(sweep, list(known)) if known else "it holds none"
            raise StoreError(f"store {self.root}: no sweep {sweep!r}; {there}")
        return known[sweep]

    def counts(self, sweep: str | None = None) -> dict[str, int]:
        """How many runs are in each state."""
        join = "" if sweep is None else "JOIN members m ON m.key = r.key AND m.sweep = :sweep"
        query = f"SELECT state, count(*) FROM runs r {join} GROUP BY state"
        counts = dict.fromkeys(("queued", "running", "done", "failed"), 0)
        with schema.explained(self.path):
            counts.update(dict(self._connection.execute(query, {"sweep": sweep}).fetchall()))
        return counts

    def remaining(
        self,
        sweep: str | None = None,
        *,
        seeds: Collection[int] | None = None,
        first: int | None = None,
        retries: int = 0,
    ) -> int:
        """How many runs (of these seeds, among the sweep's first so many) are not settled: queued, running, or failed
        with a retry left.
        """
        query = (
            "SELECT count(*) FROM runs r WHERE (state IN ('queued', 'running')"
            f" OR (state = 'failed' AND failures <= :retries)){scope(sweep, seeds, first)}"
        )
        values = {"sweep": sweep, "first": first, "retries": retries}
        with schema.explained(self.path):
            return int(self._connection.execute(query, values).fetchone()[0])

    def claimed(self) -> int:
        """How often a run of this store has been taken up."""
        with schema.explained(self.path):
            return int(self._connection.execute("SELECT count(*) FROM attempts").fetchone()[0])

    def attempts(self, key: str) -> list[dict[str, Any]]:
        """The history of one run."""
        with schema.explained(self.path):
            return [
                dict(r)
                for r in self._connection.execute("SELECT * FROM attempts WHERE key = ? ORDER BY number", (key,))
            ]


def scope(sweep: str | None, seeds: Collection[int] | None, first: int | None = None) -> str:
    """The condition on a run `r` that it belongs to the parameter :sweep, and to its :first so many, and has one of
    the seeds.
    """
    text = ""
    if sweep is not None:
        early = "" if first is None else " AND m.position < :first"
        text += f" AND EXISTS (SELECT 1 FROM members m WHERE m.key = r.key AND m.sweep = :sweep{early})"
    if seeds is not None:
        numbers = ", ".join(str(int(seed)) for seed in seeds)
        text += f" AND json_valid(r.config) AND json_extract(r.config, '$.train.seed') IN ({numbers})"
    return text


def config_of(key: str, text: str) -> RunConfig:
    """The configuration kept for a key; DamagedError if it is not the one that the key names."""
    try:
        config = RunConfig.from_dict(json.loads(text))
        if config.key == key:
            return config
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise DamagedError("damaged: its configuration is not the one that its key names")


def _row(row: Any) -> Row:
    """One row of the store; one that is damaged has the state "damaged" and says why, and the others go on."""
    config, record, whole, state, error = RunConfig({}), None, True, row["state"], row["error"]
    try:
        config = config_of(row["key"], row["config"])
        if row["record"] is not None:
            record, whole = unsealed(json.loads(row["record"]))
    except (DamagedError, ValueError, RecursionError) as reason:
        told = isinstance(reason, DamagedError)
        state, record, error = DAMAGED, None, str(reason) if told else "damaged: its record is no JSON"
    return Row(
        key=row["key"],
        config=config,
        label=row["label"],
        state=state,
        failures=row["failures"],
        interruptions=row["interruptions"],
        attempt=row["attempt"],
        owner=row["owner"],
        lease=row["lease"],
        started=row["started"],
        seconds=row["seconds"],
        error=error,
        record=record,
        variant=row["variant"],
        sealed=whole,
    )
