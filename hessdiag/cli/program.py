"""The command line: arguments in, exit codes out. One module per command in `hessdiag.cli`."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hessdiag.cli import compare, curvature, data, inspect, measure
from hessdiag.cli.exits import EPILOG, USAGE, complain, one_line


class OneLine(TyperGroup):
    """Commands whose usage errors, too, are one line on stderr."""

    def main(self, *args: Any, **options: Any) -> Any:
        """As the library's, which would draw a box around the error."""
        if not options.get("standalone_mode", True):
            return super().main(*args, **options)
        try:
            code = super().main(*args, **{**options, "standalone_mode": False})
        except typer.Abort:
            sys.exit(1)
        except Exception as error:
            told = getattr(error, "format_message", None)
            if told is None or type(error).__name__ == "NoArgsIsHelpError":
                show = getattr(error, "show", None)
                if show is None:
                    raise
                show()
                sys.exit(USAGE)
            where = getattr(getattr(error, "ctx", None), "command_path", "hessdiag")
            complain(f"{one_line(Exception(told()))}{meant(told())} ({where} --help)")
            sys.exit(getattr(error, "exit_code", USAGE))
        sys.exit(code if isinstance(code, int) else 0)


def meant(message: str) -> str:
    """What was meant by a file in the place of a command."""
    name = message.partition("No such command '")[2].partition("'")[0]
    if name and (os.path.exists(name) or name.endswith((".pt", ".pth", ".safetensors", ".bin", ".ckpt", "-example"))):
        return f" Did you mean: hessdiag measure {name}?"
    return ""


app = typer.Typer(
    name="hessdiag",
    cls=OneLine,
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
