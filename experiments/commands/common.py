"""Options that several commands take, each described once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Root = Annotated[Path | None, typer.Option(help="Where data lies; $HESSDIAG_DATA by default.")]
Results = Annotated[Path, typer.Option(help="Directory of exported results.")]
StoreFolder = Annotated[Path, typer.Option(help="Directory of the store.")]
Seeds = Annotated[str | None, typer.Option(help="Seeds instead of the file's: 0,1,2.")]
Quiet = Annotated[bool, typer.Option(help="No progress on standard error.")]
Device = Annotated[str | None, typer.Option(help="cuda, cpu; by default the GPU if there is one.")]
TrainedOn = Annotated[str | None, typer.Option(help="Data set; by default that of training.")]
NotSaid = Annotated[str | None, typer.Option(help="Of a public checkpoint that does not say.")]
