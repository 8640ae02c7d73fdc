"""The store of runs: what is to be done, who does it, what came out.

Every change is one transaction that takes the write lock first. A run is *queued*, *running* under one
owner's lease, *done* with its record, or *failed* with its error. Only the owner that holds the lease may
finish or fail a run, so a process that was thought dead and returns cannot record anything a second time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.sweep import schema
from experiments.sweep.keys import RunConfig, dumps
from experiments.sweep.owner import Owner
from experiments.sweep.reader import DAMAGED, Reader, Row, config_of, scope
from experiments.sweep.seals import DamagedError, sealed

LEASE_SECONDS = 60.0
MAX_INTERRUPTIONS = 10
FREE = "owner = NULL, lease = NULL"  # nobody holds it


@dataclass(frozen=True)
class Claim:
    """The right to do one run until it is finished, failed, released, or the lease runs out."""

    key: str
    config: RunConfig
    attempt: int
    owner: str


class Store(Reader):
    """A directory with store.sqlite and one directory per run; as many processes as like may open it."""

    def __init__(self, root: str | Path, *, write: bool = True) -> None:
        super().__init__(root, write=write)

    # what is to be done

    def add(
        self,
        name: str,
        runs: Iterable[RunConfig],
        *,
        tier: str,
        figure: str = "",
        title: str = "",
        variants: Mapping[str, str] | None = None,
        later: Collection[str] = (),
    ) -> int:
        """Register a sweep and its runs; those known already are kept as they are. Returns how many were new.

        Two drivers may bring different seeds of one sweep: the sweep then holds both. Within the seeds that come
        now, and for all of them where settings were edited, runs that the sweep no longer names leave it; their
        results stay in the store. `later`: keys that the sweep names but does not bring now, which stay if they are in.
        """
        new, runs = 0, list(runs)
        keys, families = {run.key for run in runs}, {run.family for run in runs}
        seeds = {run.train.get("seed") for run in runs}
        with schema.transaction(self._connection, self.path):
            execute = self._connection.execute
            execute(
                "INSERT INTO sweeps VALUES (?, ?, ?, ?, ?)"
                " ON CONFLICT (name) DO UPDATE SET tier = excluded.tier, figure = excluded.figure,"
                " title = excluded.title",
                (name, tier, figure, title, time.time()),
            )
            members = "SELECT r.key, r.config FROM members m JOIN runs r USING (key) WHERE m.sweep = ?"
            for key, config in execute(members, (name,)).fetchall():
                try:
                    member = config_of(key, config)
                except DamagedError:
                    continue  # named by whoever reads it
                other = member.family in families and member.train.get("seed") not in seeds
                named = key in keys or key in later or other
                if not named:
                    execute("DELETE FROM members WHERE sweep = ? AND key = ?", (name, key))
            for position, run in enumerate(runs):
                row = (run.key, dumps(run.to_dict()), run.label)
                new += execute("INSERT OR IGNORE INTO runs (key, config, label) VALUES (?, ?, ?)", row).rowcount
                execute(
                    "INSERT INTO members VALUES (?, ?, ?, ?) ON CONFLICT (sweep, key)"
                    " DO UPDATE SET position = excluded.position, variant = excluded.variant",
                    (name, position, run.key, (variants or {}).get(run.key, "")),
                )
        return new

    def requeue_damaged(self, sweep: str) -> list[Row]:
        """Put the runs of a sweep back whose record is not what was written: their own files are adopted if those are
        whole. Returns them as they were.
        """
        damaged = [row for row in self.rows(sweep) if row.state == DAMAGED and row.config.train]
        with schema.transaction(self._connection, self.path):
            change = f"UPDATE runs SET state = 'queued', {FREE}, record = NULL WHERE key = ? AND state = 'done'"
            self._connection.executemany(change, [(row.key,) for row in damaged])
        return damaged

    def claim(
        self,
        owner: str,
        *,
        sweep: str | None = None,
        seeds: Collection[int] | None = None,
        first: int | None = None,
        retries: int = 0,
        lease: float = LEASE_SECONDS,
        interruptions: int = MAX_INTERRUPTIONS,
    ) -> Claim | None:
        """Take the next run (of these seeds, among the sweep's first so many), queued or failed at most `retries`
        times; None when none is free.
        """
        query = "SELECT key, config, attempt FROM runs r WHERE"
        query += " (state = 'queued' OR (state = 'failed' AND failures <= :retries))"
        query += scope(sweep, seeds, first)
        own = "" if sweep is None else " AND m.sweep = :sweep"
        position = f"(SELECT min(position) FROM members m WHERE m.key = r.key{own})"
        query += f" ORDER BY state = 'failed', {position}, key LIMIT 1"
        with schema.transaction(self._connection, self.path):
            self._reclaim(interruptions)
            values = {"retries": retries, "sweep": sweep, "first": first}
            while True:
                row = self._connection.execute(query, values).fetchone()
                if row is None:
                    return None
                try:
                    config = config_of(row["key"], row["config"])
                    break
                except DamagedError as reason:  # never to be claimed again; the others go on
                    change = "UPDATE runs SET state = 'failed', failures = ?, error = ? WHERE key = ?"
                    self._connection.execute(change, (1 << 30, str(reason), row["key"]))
            now, attempt = time.time(), int(row["attempt"]) + 1
            self._connection.execute(
                "UPDATE runs SET state = 'running', owner = ?, lease = ?, started = ?, attempt = ? WHERE key = ?",
                (owner, now + lease, now, attempt, row["key"]),
            )
            self._connection.execute(
                "INSERT INTO attempts (key, number, owner, started) VALUES (?, ?, ?, ?)",
                (row["key"], attempt, owner, now),
            )
        return Claim(row["key"], config, attempt, owner)

    def _reclaim(self, limit: int) -> None:
        """Put the runs of dead owners back; one whose workers die again and again has failed."""
        now = time.time()
        running = "SELECT key, owner, lease, interruptions FROM runs WHERE state = 'running'"
        for row in self._connection.execute(running).fetchall():
            alive = Owner.parse(row["owner"]).alive
            if alive or (alive is None and row["lease"] >= now):
                continue
            died = int(row["interruptions"]) + 1
            self._end_attempt(row["key"], "interrupted", None)
            if died < limit:
                change = "state = 'queued', interruptions = ?"
                values: tuple[Any, ...] = (died, row["key"])
            else:
                change = "state = 'failed', interruptions = 0, failures = failures + 1, error = ?"
                values = (f"its worker died {died} times without an error of its own (memory?)", row["key"])
            self._connection.execute(f"UPDATE runs SET {change}, {FREE} WHERE key = ?", values)

    def _end_attempt(self, key: str, outcome: str, error: str | None) -> None:
        self._connection.execute(
            "UPDATE attempts SET ended = ?, outcome = ?, error = ? WHERE key = ?"
            " AND number = (SELECT attempt FROM runs WHERE runs.key = attempts.key)",
            (time.time(), outcome, error, key),
        )

    # what the holder of a claim may do

    def _held(self, claim: Claim, assignments: str, values: tuple[Any, ...]) -> bool:
        condition = "key = ? AND owner = ? AND attempt = ? AND state = 'running'"
        values = (*values, claim.key, claim.owner, claim.attempt)
        return self._connection.execute(f"UPDATE runs SET {assignments} WHERE {condition}", values).rowcount == 1

    def heartbeat(self, claim: Claim, *, lease: float = LEASE_SECONDS) -> bool:
        """Extend the lease; False when the run is no longer this owner's."""
        with schema.transaction(self._connection, self.path):
            return self._held(claim, "lease = ?", (time.time() + lease,))

    def finish(self, claim: Claim, record: Mapping[str, Any], seconds: float) -> bool:
        """Record the result and mark the run done, in one transaction; False when the claim was lost
        meanwhile.
        """
        with schema.transaction(self._connection, self.path):
            self._end_attempt_of(claim, "done", None)
            return self._held(
                claim,
                f"state = 'done', {FREE}, finished = ?, seconds = ?, error = NULL, record = ?",
                (time.time(), seconds, json.dumps(sealed(record), sort_keys=True)),
            )

    def fail(self, claim: Claim, error: str) -> bool:
        """Keep the error's text; whether the run is tried again is for the next claim to say."""
        with schema.transaction(self._connection, self.path):
            self._end_attempt_of(claim, "failed", error)
            return self._held(
                claim,
                f"state = 'failed', {FREE}, failures = failures + 1, finished = ?, error = ?",
                (time.time(), error),
            )

    def release(self, claim: Claim, reason: str) -> bool:
        """Give the run back unharmed: the holder was told to stop, or ran out of disk."""
        with schema.transaction(self._connection, self.path):
            self._end_attempt_of(claim, "released", reason)
            return self._held(claim, f"state = 'queued', {FREE}", ())

    def interrupt(self, claim: Claim, reason: str, *, limit: int = MAX_INTERRUPTIONS) -> None:
        """The process that did the run for this owner died (a cluster node went away): as `_reclaim` counts
        it.
        """
        with schema.transaction(self._connection, self.path):
            self._end_attempt_of(claim, "interrupted", reason)
            if not self._held(claim, f"state = 'queued', {FREE}, interruptions = interruptions + 1", ()):
                return
            self._connection.execute(
                "UPDATE runs SET state = 'failed', failures = failures + 1, error = ?, interruptions = 0"
                " WHERE key = ? AND interruptions >= ?",
                (f"its worker died {limit} times: {reason}", claim.key, limit),
            )

    def _end_attempt_of(self, claim: Claim, outcome: str, error: str | None) -> None:
        self._connection.execute(
            "UPDATE attempts SET ended = ?, outcome = ?, error = ? WHERE key = ? AND number = ? AND owner = ?"
            " AND outcome IS NULL",
            (time.time(), outcome, error, claim.key, claim.attempt, claim.owner),
        )
