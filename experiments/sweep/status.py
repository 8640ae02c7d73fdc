"""The standing of a store as a table: sweeps, runs under way, failures with their errors."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from experiments.sweep.cost import duration
from experiments.sweep.reader import DAMAGED, Reader, Row

SHOWN = 12


def render(store: Reader, sweep: str | None = None, *, records: bool = False) -> RenderableType:
    """One picture of the store, or of one of its sweeps; with `records` those are checked, too."""
    now = time.time()
    overview = Table(title=Text(f"store {store.root}"), title_justify="left", expand=False)
    for name in ("sweep", "done", "running", "queued", "failed", "a run", "left"):
        overview.add_column(name, justify="left" if name == "sweep" else "right", no_wrap=True)
    running: dict[str, Row] = {}
    failed: dict[str, Row] = {}
    for about in store.sweeps():
        if sweep not in (None, about.name):
            continue
        rows = store.rows(about.name, records=records)
        running.update({row.key: row for row in rows if row.state == "running"})
        failed.update({row.key: row for row in rows if row.state in ("failed", DAMAGED)})
        overview.add_row(*_line(about.name, rows))
    parts: list[RenderableType] = [overview]
    if running:
        parts.append(_running(list(running.values()), now))
    if failed:
        parts.append(_failed(list(failed.values())))
    return Group(*parts)


def _line(name: str, rows: Sequence[Row]) -> list[str]:
    counts = {state: sum(row.state == state for row in rows) for state in ("done", "running", "queued", "failed")}
    counts["failed"] += sum(row.state == DAMAGED for row in rows)
    seconds = [row.seconds for row in rows if row.state == "done" and row.seconds is not None]
    each = sum(seconds) / len(seconds) if seconds else None
    left = counts["running"] + counts["queued"]
    rest = "" if each is None or not left else duration(each * left / max(1, counts["running"]))
    numbers = [f"{counts['done']}/{len(rows)}", *(str(counts[s] or "") for s in ("running", "queued", "failed"))]
    return [name, *numbers, "" if each is None else duration(each), rest]


def _running(rows: list[Row], now: float) -> Table:
    table = Table(title="under way", title_justify="left")
    for name in ("run", "what", "since", "attempt", "worker"):
        table.add_column(name, no_wrap=name != "what")
    for row in rows[:SHOWN]:
        since = duration(now - row.started) if row.started else ""
        table.add_row(row.key[:8], Text(row.label), since, str(row.attempt), row.worker)
    return _rest(table, len(rows), 5)


def _failed(rows: list[Row]) -> Table:
    table = Table(title="failed", title_justify="left")
    for name in ("run", "what", "times", "error"):
        table.add_column(name, no_wrap=name in ("run", "times"))
    for row in rows[:SHOWN]:
        first = (row.error or "").strip().splitlines() or [""]
        table.add_row(row.key[:8], Text(row.label), str(row.failures), Text(first[0], style="red"))
    return _rest(table, len(rows), 4)


def _rest(table: Table, number: int, columns: int) -> Table:
    if number > SHOWN:
        table.add_row("...", f"and {number - SHOWN} more", *[""] * (columns - 2))
    return table


def listing(rows: Sequence[Row]) -> Table:
    """Every run of a sweep with what came out."""
    table = Table()
    for name in ("run", "what", "state", "time", "clean", "AA-2", "norm (test)"):
        table.add_column(name, no_wrap=name != "what", justify="left" if name in ("run", "what") else "right")
    for row in rows:
        record = row.record or {}
        clean = (record.get("clean_accuracy") or {}).get("value")
        robust = (record.get("aa2") or {}).get("value")
        norm = ((record.get("norms") or {}).get("test/clean") or {}).get("rms")
        shown = [f"{100 * x:.1f}" if x is not None else "" for x in (clean, robust)]
        seconds = duration(row.seconds) if row.seconds is not None else ""
        table.add_row(row.key[:8], Text(row.label), row.state, seconds, *shown, f"{norm:.3g}" if norm else "")
    return table
