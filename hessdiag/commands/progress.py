"""Progress on stderr, where somebody watches; nothing into pipes and files."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hessdiag.measurement.loop import Callback, Event


@contextmanager
def watch(*, show: bool) -> Iterator[Callback | None]:
    """A callback for `measure` that draws a bar, or None."""
    if not show or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[norm]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading", total=None, norm="")
        phase = ""

        def tell(event: Event) -> None:
            nonlocal phase
            if event.estimate is not None:
                e = event.estimate
                bar.update(task, norm=f"rms {e.rms:.4g} [{e.low:.4g}, {e.high:.4g}]")
                return
            if event.phase != phase:
                phase = event.phase
                bar.reset(task, total=event.total)
            label = f"replicate {event.replicates + 1}" if event.phase == "replicates" else event.phase
            bar.update(task, description=label, completed=event.done, total=event.total)

        yield tell
