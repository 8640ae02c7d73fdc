"""`python -m experiments status`: how the sweeps of a store stand."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from experiments.commands.common import StoreFolder
from experiments.sweep import status
from experiments.sweep.reader import Reader


def command(
    store: StoreFolder = Path("runs/sweeps"),
    sweep: Annotated[str | None, typer.Option(help="One sweep only, such as smoke/figure3.")] = None,
    watch: Annotated[bool, typer.Option(help="Refresh until nothing is left to do, or Ctrl-C.")] = False,
    list_runs: Annotated[bool, typer.Option("--list", help="Every run with what came out.")] = False,
) -> int:
    """Show done, running, queued and failed runs, who works on what, and the errors."""
    console = Console()
    reader = Reader(store)
    if sweep is not None:
        reader.about(sweep)
    if not watch:
        console.print(status.render(reader, sweep, records=True))
        if list_runs:
            console.print(status.listing(reader.rows(sweep)))
        return 0
    with Live(status.render(reader, sweep), console=console, refresh_per_second=4) as live:
        while reader.remaining(sweep):
            time.sleep(1.0)
            live.update(status.render(reader, sweep))
    return 0
