"""`hessdiag data`: what data sets there are, where they lie, and how to get them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hessdiag.cli.complete import FETCHED, of
from hessdiag.cli.exits import OK, guarded

NAME = "data"
EXAMPLES = """[bold]Examples[/bold]

hessdiag data                       [dim]# what is here, what is not, where to put it[/dim]

hessdiag data cifar10               [dim]# fetch, check, unpack[/dim]

hessdiag data cifar10 --root /big/disk"""


@guarded
def command(
    names: Annotated[
        list[str] | None, typer.Argument(autocompletion=of(FETCHED), help="Data sets to fetch: cifar10, cifar100.")
    ] = None,
    *,
    root: Annotated[
        Path | None, typer.Option(help="Where they lie; else $HESSDIAG_DATA, else ~/.cache/hessdiag.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> int:
    """List data sets and where they lie, or fetch those named: checksums compared, progress on stderr."""
    import sys

    from hessdiag.data import default_root, fetch
    from hessdiag.show.datasets import print_shelves
    from hessdiag.show.table import terminal

    base = root if root is not None else default_root()
    for name in names or ():
        folder = fetch(name, base, progress=not quiet and sys.stderr.isatty())
        print(folder)
    if not names:
        print_shelves(terminal(), base)
    return OK
