"""`hessdiag curvature`: the largest |sigma''| of an activation, where, and its picture."""

from __future__ import annotations

from typing import Annotated

import typer

from hessdiag.cli.complete import ACTIVATIONS, of
from hessdiag.cli.exits import OK, guarded

NAME = "curvature"
EXAMPLES = """[bold]Examples[/bold]

hessdiag curvature mish

hessdiag curvature rct:beta=2,alpha=5 silu gelu relu

hessdiag curvature rct:beta=1,curvature=7      [dim]# alpha for a wanted curvature[/dim]

hessdiag curvature mycode.acts:my_function --range 8

hessdiag curvature mish --quiet                [dim]# the number alone[/dim]"""


@guarded
def command(
    activation: Annotated[
        list[str],
        typer.Argument(
            autocompletion=of(ACTIVATIONS),
            help="Names with options (silu, rct:beta=1,alpha=14), or package.module:function.",
        ),
    ],
    *,
    range_: Annotated[float, typer.Option("--range", help="Half the width of the picture; by itself if 0.")] = 0.0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="The numbers alone, one per line.")] = False,
) -> int:
    """Tell max|sigma''| of activations, where it is reached, and draw sigma''."""
    import torch

    from hessdiag import activations
    from hessdiag.errors import ConfigurationError
    from hessdiag.show.curve import print_curvature
    from hessdiag.show.table import terminal
    from hessdiag.store.factories import import_object, is_factory_name

    if not 0.0 <= range_ < 1e4:
        raise ConfigurationError(f"--range {range_}: a number from 0 to 10000 is needed")
    torch.set_num_threads(1)  # a few thousand points: more threads would wait for each other longer than they work
    for spec in activation:
        function = import_object(spec) if is_factory_name(spec) else spec
        found = activations.curvature(function)
        if quiet:
            print(repr(found.value))
        else:
            print_curvature(terminal(), spec, function, found, half_width=range_ or None)
    return OK
