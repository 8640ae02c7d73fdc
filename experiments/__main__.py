"""`python -m experiments COMMAND`: train, attack, and whatever else stands in `experiments.commands`.

A command is a module of `experiments.commands` with a function `register(app)`; it is imported only when it is called
or when help is asked for, so that `train --help` does not wait for what sweeps need.
"""

from __future__ import annotations

import importlib
import sys

import typer

from hessdiag.cli.exits import guarded

# Name on the command line -> module that registers it.
COMMANDS = {
    "train": "experiments.commands.train",
    "attack": "experiments.commands.attack",
    "recipes": "experiments.commands.recipes",
    "sweep": "experiments.commands.sweep",
    "card": "experiments.commands.card",
    "status": "experiments.commands.status",
    "figures": "experiments.commands.figures",
    "verdicts": "experiments.commands.verdicts",
    "power": "experiments.commands.power",
}
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
    names = [called] if called in COMMANDS else list(COMMANDS)
    for name in names:
        importlib.import_module(COMMANDS[name]).register(app)
    for command in app.registered_commands:
        assert command.callback is not None
        command.callback = guarded(command.callback, program=PROGRAM)
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
