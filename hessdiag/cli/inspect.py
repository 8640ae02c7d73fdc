"""`hessdiag inspect`: what is inside a checkpoint, without building or measuring anything."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hessdiag.cli.complete import example_or_file
from hessdiag.cli.exits import Outputs, guarded

NAME = "inspect"
EXAMPLES = """[bold]Examples[/bold]

hessdiag inspect digits-example

hessdiag inspect trades.pt --tensors

hessdiag inspect model.safetensors --json -

The file is read as tensors and plain values only; nothing in it is executed."""


@guarded
def command(
    checkpoint: Annotated[
        str,
        typer.Argument(
            autocompletion=example_or_file,
            help="A .pt, .pth or .safetensors file, the index or the folder of several, or digits-example.",
        ),
    ],
    *,
    key: Annotated[str | None, typer.Option(help="Where in the file the state dict lies, e.g. trainer.model.")] = None,
    prefix: Annotated[str | None, typer.Option(help="The tensors under this prefix alone, e.g. student.")] = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    json: Annotated[str | None, typer.Option(help="Write all of it as JSON; - for stdout.")] = None,
) -> int:
    """Show what a checkpoint holds: format, network, activation, training facts, tensors."""
    from hessdiag.checkpoint import inspect_checkpoint
    from hessdiag.cli.places import check_places
    from hessdiag.examples import example_path
    from hessdiag.show.inspection import print_summary
    from hessdiag.show.result_file import strict, write_json
    from hessdiag.show.table import terminal

    path = Path(checkpoint)
    path = path if path.exists() else example_path(checkpoint) or path
    check_places({"--json": json}, {"the checkpoint": path})
    found = inspect_checkpoint(path, key=key, prefix=prefix)
    if json != "-":
        print_summary(terminal(), found, tensors=tensors)
    outputs = Outputs()
    if json is not None:
        with outputs.attempt("stdout" if json == "-" else "--json"):
            write_json(json, strict({"schema": "hessdiag-inspect/1", **found.to_dict()}))
    return outputs.close()
