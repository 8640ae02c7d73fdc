"""`python -m experiments COMMAND`: train, attack, and whatever else stands in `experiments.commands`.

A command is a module of `experiments.commands` with a function `register(app)`; it is imported only when it is called
or when help is asked for, so that `train --help` does not wait for what sweeps need.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback

import typer

from hessdiag.commands.exits import INTERNAL, INTERRUPTED, PIPE, RESOURCES, code_of
from hessdiag.errors import HessdiagError

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
    return app


def main(arguments: list[str] | None = None) -> int:
    """Run a command; a refusal is one line on standard error, its exit code that of `hessdiag` for the same."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        outcome = application(words)(words, standalone_mode=False)
    except HessdiagError as error:
        print(f"error: {error}", file=sys.stderr)
        return code_of(error)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except Exception as error:
        show = getattr(error, "show", None)  # click's usage errors print themselves
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # which Python flushes once more at exit
            return PIPE
        if isinstance(error, MemoryError):
            print("error: out of memory; fewer workers, or smaller batches", file=sys.stderr)
            return RESOURCES
        if show is None:
            traceback.print_exc()
            return INTERNAL
        show()
        return int(getattr(error, "exit_code", 2))
    return outcome if isinstance(outcome, int) else 0


if __name__ == "__main__":
    sys.exit(main())
