"""`python -m experiments COMMAND`: train, attack, and whatever else stands in `experiments.commands`.

A command is a module of `experiments.commands` with a function `command`; it is imported only when it is called or when
help is asked for, so that `train --help` does not wait for what sweeps need.
"""

from __future__ import annotations

import importlib
import sys

import typer

from hessdiag.cli.exits import guarded

COMMANDS = ("train", "attack", "recipes", "sweep", "card", "status", "figures", "verdicts", "power", "noise")
PROGRAM = "experiments"


def application(arguments: list[str]) -> typer.Typer:
    """The command that is called, or all of them."""
    app = typer.Typer(
        name="python -m experiments",
        help="Train networks robustly, attack them, sweep and draw.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.callback()(lambda: None)
    called = next((word for word in arguments if not word.startswith("-")), None)
    for name in [called] if called in COMMANDS else COMMANDS:
        module = importlib.import_module(f"experiments.commands.{name}")
        app.command(name)(guarded(module.command, program=PROGRAM))
    return app


def main(arguments: list[str] | None = None) -> int:
    """Run a command; refusals and exit codes are those of `hessdiag` (docs/measure.md)."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        application(words)(words, prog_name="python -m experiments")
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
