"""The store of runs as those who work on it see it: sweeps are added, runs are claimed, and claims end.

A claim is a lock on the run's directory. It lasts until it is ended or its process is, and only its holder writes
there, so that as many drivers and workers as like share a store and SIGKILL at any moment loses nothing.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.sweep import former
from experiments.sweep.files import (
    LOCK,
    RESULT,
    Attempt,
    GoneError,
    explained,
    lock,
    locked,
    read_attempts,
    write_attempts,
    write_config,
    write_result,
)
from experiments.sweep.keys import RunConfig
from experiments.sweep.reader import (
    DAMAGED,
    FAILED,
    FORM,
    MARK,
    QUEUED,
    Member,
    Reader,
    Registered,
    Row,
    failed,
    failures,
    settled,
)
from hessdiag.errors import StoreError
from hessdiag.store.files import replace_file

MAX_INTERRUPTIONS = 10
OWN = {MARK, "sweeps", "runs", "logs", "lock"}


@dataclass(eq=False)
class Claim:
    """The right to do one run until it is finished, failed, released, or this process ends."""

    root: Path
    folder: Path
    config: RunConfig
    tried: list[Attempt]
    handle: int

    def finish(self, record: Mapping[str, Any], seconds: float) -> None:
        """Record the result, by which the run is done."""
        with explained(self.root):
            write_result(self.folder, self.config, record, seconds)
        self.let_go()

    def fail(self, error: str) -> None:
        """Keep the error's text; whether the run is tried again is for the next claim to say."""
        self._end(FAILED, error)

    def release(self, reason: str) -> None:
        """Give the run back unharmed: the holder was told to stop, or ran out of disk."""
        self._end("released", reason)

    def interrupt(self, reason: str) -> None:
        """The process that did the run for this one died (a cluster node went away)."""
        self._end("interrupted", reason)

    def note(self, outcome: str, error: str | None) -> None:
        """Write down how the attempt ends."""
        self.tried[-1].update(outcome=outcome, error=error)
        with explained(self.root):
            write_attempts(self.folder, self.tried)

    def let_go(self) -> None:
        """Give the lock up; an attempt that did not end otherwise counts as interrupted."""
        if self.handle >= 0:
            os.close(self.handle)
            self.handle = -1

    def _end(self, outcome: str, error: str) -> None:
        try:
            self.note(outcome, error)
        finally:
            self.let_go()


class Store(Reader):
    """A store to work on, made (if `make`) where there is none; as many processes as like may open it."""

    def __init__(self, root: str | Path, *, make: bool = True) -> None:
        prepare(Path(root), make=make)
        super().__init__(root)

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
    ) -> None:
        """Register a sweep and its runs; what is known of them already is kept as it is.

        Two drivers may bring different seeds of one sweep: the sweep then holds both. Within the seeds that come
        now, and for all of them where settings were edited, runs that the sweep no longer names leave it; their
        results stay in the store. `later`: keys that the sweep names but does not bring now, which stay if they are in.
        """
        runs = list(runs)
        members = {
            run.key: Member(run.key, position, (variants or {}).get(run.key, ""), run)
            for position, run in enumerate(runs)
        }
        families, seeds = {run.family for run in runs}, {run.train.get("seed") for run in runs}
        path = self._path(name)
        with explained(self.root), locked(self.root / "lock"):
            before = self._before(path)
            for member in before.members if before else ():
                run = member.config
                if run is None:  # not to be told what it is; if it is one of those that come, it is mended
                    continue
                if member.key in later or (run.family in families and run.train.get("seed") not in seeds):
                    members.setdefault(member.key, member)
            content: dict[str, Any] = {"name": name, "tier": tier, "figure": figure, "title": title}
            content["added"] = before.added if before else time.time()
            content["runs"] = [member.to_dict() for member in members.values()]
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, json.dumps(content, sort_keys=True).encode())

    def _before(self, path: Path) -> Registered | None:
        """A sweep as it is registered; None where it is not, or damaged: it is written anew."""
        try:
            return self._sweep(path) if path.exists() else None
        except StoreError:
            return None

    def requeue_damaged(self, sweep: str) -> list[Row]:
        """Set the results of a sweep aside that are not what was written. Returns the rows as they were."""
        damaged = [row for row in self.rows(sweep) if row.state == DAMAGED and row.config.train]
        with explained(self.root):
            for row in damaged:
                os.replace(self.folder(row.key) / RESULT, self.folder(row.key) / "damaged.json")
        return damaged

    def adopt(self, config: RunConfig, record: Mapping[str, Any], seconds: float, *, source: str) -> bool:
        """Take a result over that was recorded elsewhere; False where the run is done already, or somebody does it."""
        claim = self._held(config)
        if claim is None:
            return False
        try:
            if (claim.folder / RESULT).exists():
                return False
            self._enter(claim, source)
            claim.finish(record, seconds)
            return True
        finally:
            claim.let_go()

    def claim(
        self,
        *,
        sweep: str | None = None,
        seeds: Collection[int] | None = None,
        first: int | None = None,
        retries: int = 0,
        interruptions: int = MAX_INTERRUPTIONS,
    ) -> Claim | None:
        """Take the next of the chosen runs, queued or failed at most `retries` times; None when none is free."""
        again = []
        for key, config in self.chosen(sweep, seeds=seeds, first=first):
            state, tried = self.standing(key)
            if state == FAILED and failures(tried) <= retries:
                again.append(config)
            elif state == QUEUED and (claim := self._take(config, retries, interruptions)):
                return claim
        return next((claim for config in again if (claim := self._take(config, retries, interruptions))), None)

    def _take(self, config: RunConfig, retries: int, limit: int) -> Claim | None:
        """The claim on one run, if it is still free."""
        claim = self._held(config)
        if claim is None:
            return None
        try:
            if not (claim.folder / RESULT).exists() and self._begin(claim, retries, limit):
                return claim
        except BaseException:
            claim.let_go()
            raise
        claim.let_go()
        return None

    def _begin(self, claim: Claim, retries: int, limit: int) -> bool:
        """Whether the run may be tried now; one whose workers die again and again has failed."""
        if failed(claim.tried) and failures(claim.tried) > retries:
            return False
        died = deaths(claim.tried)
        if died >= limit:
            claim.note(FAILED, f"its worker died {died} times without an error of its own (memory?)")
            return False
        self._enter(claim, worker_name(os.getpid()))
        return True

    def _held(self, config: RunConfig) -> Claim | None:
        """A hold on a run's directory; None where another process has it."""
        folder = self.folder(config.key)
        with explained(self.root):
            folder.mkdir(parents=True, exist_ok=True)
            handle = lock(folder / LOCK)
        return None if handle is None else Claim(self.root, folder, config, settled(read_attempts(folder)), handle)

    def _enter(self, claim: Claim, worker: str) -> None:
        """Write down that an attempt begins, and what the run is."""
        claim.tried.append({"worker": worker, "started": time.time(), "outcome": None, "error": None})
        with explained(self.root):
            write_attempts(claim.folder, claim.tried)
            write_config(claim.folder, claim.config)


def worker_name(pid: int) -> str:
    """What the history of a run calls a process of this machine."""
    return f"{platform.node()}:{pid}"


def deaths(tried: list[Attempt]) -> int:
    """How often the process that did a run has died since the run last failed."""
    outcomes = [attempt["outcome"] for attempt in tried]
    after = len(outcomes) - outcomes[::-1].index(FAILED) if FAILED in outcomes else 0
    return outcomes[after:].count("interrupted")


def prepare(root: Path, *, make: bool) -> None:
    """See that a directory is a store, or can be one, before any work is done."""
    if not make and not (root / MARK).exists():
        raise GoneError(root)
    with explained(root):
        root.mkdir(parents=True, exist_ok=True)
        strangers = sorted({item.name for item in root.iterdir() if item.suffix != ".tmp"} - OWN)
        if former.NAME in strangers:
            raise StoreError(
                f"store {root}: of the form before ({former.NAME}): it can be listed and exported, not gone on with; "
                "name another directory with --store"
            )
        if not (root / MARK).exists():
            if strangers:
                raise StoreError(
                    f"store {root}: the directory holds other files ({strangers[0]}, ...) and no store; "
                    "name a new or empty directory with --store"
                )
            replace_file(root / MARK, json.dumps({"form": FORM}).encode())
        (root / "runs").mkdir(exist_ok=True)
        probe = root / "runs" / ".writable"
        probe.write_bytes(b"1")
        probe.unlink(missing_ok=True)
