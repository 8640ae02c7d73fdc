"""Exit codes, and the one place where an exception becomes a line on stderr."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import typer

from hessdiag import errors

OK, WIDE, USAGE, BAD_FILE, UNMEASURABLE, RESOURCES, LOST, INTERNAL, INTERRUPTED, PIPE = (
    *range(7),
    70,
    130,
    141,
)
CODES = {
    OK: "the result is there, as narrow as asked for",
    WIDE: "the result is there, but wider than --rtol asked for, or cut short; its status says why",
    USAGE: "the command line is wrong",
    BAD_FILE: "a file or data set is missing, damaged, hostile, or does not fit the model",
    UNMEASURABLE: "the model cannot be measured in this way; the message names the layer and another method",
    RESOURCES: "too little memory, or no such device",
    LOST: "another process of the same measurement was lost",
    INTERNAL: "a fault of this program; run again with --debug and report it",
    INTERRUPTED: "interrupted before there was a result",
    PIPE: "whoever read the output went away",
}
EPILOG = (
    "[bold]Start here[/bold]\n\n"
    "hessdiag measure digits-example      [dim]# a shipped network, on scikit-learn's digits[/dim]\n\n"
    "hessdiag measure --help              [dim]# every option, with examples[/dim]\n\n"
    "Exit codes: 0 fine; 1 a result, but wider than asked for; 2 wrong usage; 3 bad file or data; "
    "4 not measurable so; 5 memory or device; 6 a process was lost; 70 internal; 130 interrupted."
)

_KINDS: tuple[tuple[int, tuple[type[errors.HessdiagError], ...]], ...] = (
    (LOST, (errors.DistributedError,)),
    (RESOURCES, (errors.OutOfMemoryError, errors.DeviceError)),
    (
        UNMEASURABLE,
        (
            errors.UncoveredModelError,
            errors.AuditError,
            errors.StochasticModeError,
            errors.NotDeterministicError,
            errors.BudgetError,
        ),
    ),
    (
        BAD_FILE,
        (
            errors.CheckpointError,
            errors.DataError,
            errors.EmptyDataError,
            errors.ResumeError,
            errors.StoreError,
            errors.TargetError,
            errors.NonFiniteError,
            errors.DtypeError,
        ),
    ),
    (USAGE, (errors.ConfigurationError, errors.NoParametersError)),
)


def code_of(error: errors.HessdiagError) -> int:
    """The exit code of a refusal."""
    for code, kinds in _KINDS:
        if isinstance(error, kinds):
            return code
    return INTERNAL


def one_line(error: BaseException) -> str:
    """An exception's message on one line, free of control characters, of bearable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= 2000 else text[:1997] + "..."


def complain(text: str) -> None:
    """One line on stderr, with the process's number where there are several."""
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    where = f" (process {rank} of {size})" if size != "1" else ""
    print(f"hessdiag{where}: {text}", file=sys.stderr, flush=True)


Command = TypeVar("Command", bound=Callable[..., Any])


def guarded(command: Command) -> Command:
    """A command whose refusals are one line and an exit code; with `debug=True` the traceback as well."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        debug = bool(kwargs.pop("debug", False))
        try:
            code = command(*args, **kwargs)
            sys.stdout.flush()
        except BrokenPipeError:
            # Python would complain once more when it flushes stdout at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(PIPE) from None
        except (typer.Exit, typer.Abort, SystemExit):
            raise
        except KeyboardInterrupt:
            complain("interrupted before there was a result")
            raise typer.Exit(INTERRUPTED) from None
        except errors.HessdiagError as error:
            _trace(debug)
            complain(one_line(error))
            if isinstance(error, errors.DistributedError):
                from hessdiag.commands.processes import leave_lost

                leave_lost(LOST)
            raise typer.Exit(code_of(error)) from None
        except MemoryError:
            _trace(debug)
            complain("out of memory; lower --batch-size or --samples")
            raise typer.Exit(RESOURCES) from None
        except Exception as error:
            _trace(debug)
            if type(error).__module__.startswith(("typer", "click")):
                raise
            complain(
                f"internal error, {type(error).__name__}: {one_line(error)}; run with --debug and report it"
            )
            raise typer.Exit(INTERNAL) from None
        raise typer.Exit(code or OK)

    signature = inspect.signature(command, eval_str=True)
    flag = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=DEBUG)
    run.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), flag], return_annotation=None
    )
    run.__annotations__ = {name: p.annotation for name, p in signature.parameters.items()} | {"debug": DEBUG}
    return run  # type: ignore[return-value]


def _trace(debug: bool) -> None:
    if debug:
        import traceback

        traceback.print_exc()


def _debug_option() -> Any:
    from typing import Annotated

    return Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


DEBUG = _debug_option()
