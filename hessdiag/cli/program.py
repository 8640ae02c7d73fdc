"""The command line: arguments in, exit codes out. One module per command in `hessdiag.cli`."""

from __future__ import annotations

from typing import Annotated

import typer

from hessdiag.cli import compare, curvature, data, inspect, measure
from hessdiag.cli.exits import EPILOG

app = typer.Typer(
    name="hessdiag",
    help="Hessian diagonals of neural networks: their norms, with error bars.",
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from hessdiag import __version__

        typer.echo(f"hessdiag {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Hessian diagonals of neural networks: their norms, with error bars."""


for module in (measure, compare, curvature, inspect, data):
    app.command(module.NAME, epilog=module.EXAMPLES)(module.command)


def main() -> None:
    """Entry point of the `hessdiag` script."""
    app(prog_name="hessdiag")


if __name__ == "__main__":
    main()
