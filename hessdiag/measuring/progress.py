"""Progress of a measurement where somebody watches: a bar on a terminal, a line in a notebook, nothing into files."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hessdiag.measuring.loop import Callback, Event

PAUSE = 0.2
"""Seconds between two updates in a notebook, at least: each travels to the browser."""


@contextmanager
def reporting(progress: Callback | bool | None) -> Iterator[Callback | None]:
    """What `measure(progress=...)` calls: the caller's own function, or with True whatever fits the place."""
    if callable(progress):
        yield progress
    elif not progress:
        yield None
    elif (display := _notebook()) is not None:
        with _line(display) as callback:
            yield callback
    elif sys.stderr.isatty():
        with _bar() as callback:
            yield callback
    else:
        yield None


def sentence(event: Event) -> str:
    """One event in words."""
    return f"{_phase(event)}, {event.done} of {event.total}, {event.seconds:.1f} s"


def _phase(event: Event) -> str:
    return f"replicate {event.replicates + 1}" if event.phase == "replicates" else event.phase


def norm_so_far(event: Event) -> str:
    """The norm with its interval as it stands, or nothing."""
    e = event.estimate
    return "" if e is None else f"rms {e.rms:.4g} [{e.low:.4g}, {e.high:.4g}]"


def _notebook() -> Any | None:
    """IPython's `display` where the code runs in a notebook's kernel, which stderr.isatty() does not know."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    if shell is None or not hasattr(shell, "kernel"):
        return None
    from importlib import import_module

    return import_module("IPython.display")


@contextmanager
def _line(display: Any) -> Iterator[Callback]:
    """One line below the cell, rewritten in place and taken away at the end."""

    def show(words: str) -> Any:
        return display.HTML(f"<small>{escape(words)}</small>")

    handle = display.display(show("reading"), display_id=True)
    norm, last, phase = "", 0.0, ""

    def tell(event: Event) -> None:
        nonlocal norm, last, phase
        now = time.monotonic()
        norm = norm_so_far(event) or norm
        if event.estimate is not None or (now - last < PAUSE and event.phase == phase):
            return
        last, phase = now, event.phase
        handle.update(show(", ".join(part for part in (sentence(event), norm) if part)))

    try:
        yield tell
    finally:
        handle.update(show(""))


@contextmanager
def _bar() -> Iterator[Callable[[Event], None]]:
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
                bar.update(task, norm=norm_so_far(event))
                return
            if event.phase != phase:
                phase = event.phase
                bar.reset(task, total=event.total)
            bar.update(task, description=_phase(event), completed=event.done, total=event.total)

        yield tell
