"""Exit codes, and the one place where an exception becomes a line on stderr."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import typer

from hessdiag import errors

OK, WIDE, USAGE, BAD_FILE, UNMEASURABLE, RESOURCES, LOST, UNWRITTEN, INTERNAL, INTERRUPTED, PIPE = (
    *range(7),
    8,
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
    UNWRITTEN: "the result is there, but an output was not written: 8, and 1 more for the JSON, 2 for the page or "
    "plot, 4 for the diagonal, 16 for the resume file, 32 for stdout",
    INTERNAL: "a fault of this program; run again with --debug and report it",
    INTERRUPTED: "interrupted before there was a result",
    PIPE: "whoever read the output went away",
}
EPILOG = (
    "[bold]Start here[/bold]\n\n"
    "hessdiag measure digits-example      [dim]# a shipped network, on scikit-learn's digits[/dim]\n\n"
    "hessdiag measure --help              [dim]# every option, with examples[/dim]\n\n"
    "Exit codes: 0 fine; 1 a result, but wider than asked for; 2 wrong usage; 3 bad file or data; "
    "4 not measurable so; 5 memory or device; 6 a process was lost; 8 and more: an output was not written; "
    "70 internal; 130 interrupted."
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


def complain(text: str, *, program: str = "hessdiag") -> None:
    """One line on stderr, with the process's number where there are several."""
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    where = f" (process {rank} of {size})" if size != "1" else ""
    print(f"{program}{where}: {text}", file=sys.stderr, flush=True)


OUTPUTS = {"--json": 1, "--html": 2, "--plot": 2, "--save-diagonal": 4, "--resume": 16, "stdout": 32}


class Outputs:
    """The outputs of a result that is there: every one is tried, whichever failed before it."""

    def __init__(self) -> None:
        self.code = OK
        self._pipe: BrokenPipeError | None = None

    @contextlib.contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Write the output `name` (a key of OUTPUTS) in this block; a failure is a line on stderr and a bit of the
        exit code.
        """
        try:
            yield
            if name == "stdout":
                sys.stdout.flush()
        except BrokenPipeError as error:
            self._pipe = error
        except (errors.HessdiagError, OSError, MemoryError) as error:
            self.failed(name, one_line(error))
            if name == "stdout":  # what is left in its buffer would fail once more when Python ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def failed(self, name: str, reason: str) -> None:
        """Count an output as not written."""
        complain(f"{name}: {reason}")
        self.code |= UNWRITTEN | OUTPUTS[name]

    def close(self) -> int:
        """The exit code so far; a reader of stdout that went away is told of now, when all else is written."""
        if self._pipe is not None:
            raise self._pipe
        return self.code


Command = TypeVar("Command", bound=Callable[..., Any])


def outcome(work: Callable[[], int | None], *, program: str = "hessdiag", debug: bool = False) -> int:
    """The exit code of `work`: what it returns, or that of its refusal, which becomes one line on stderr.

    The last guard of every command; with `debug` the traceback as well.
    """
    try:
        code = work()
        sys.stdout.flush()
    except BrokenPipeError:
        # Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE
    except (typer.Exit, typer.Abort, SystemExit):
        raise
    except KeyboardInterrupt as error:
        complain(str(error) or "interrupted before there was a result", program=program)
        return INTERRUPTED
    except errors.HessdiagError as error:
        _trace(debug)
        complain(one_line(error), program=program)
        if isinstance(error, errors.DistributedError):
            from hessdiag.cli.processes import leave_lost

            leave_lost(LOST)
        return code_of(error)
    except Exception as error:
        _trace(debug)
        if errors.ran_out(error):  # where is not known here: what would help is not, either
            complain("out of memory; free some, or give the machine less to hold at once", program=program)
            return RESOURCES
        if type(error).__module__.startswith(("typer", "click")):
            raise
        complain(
            f"internal error, {type(error).__name__}: {one_line(error)}; run with --debug and report it",
            program=program,
        )
        return INTERNAL
    return code or OK


def guarded(command: Command, *, program: str = "hessdiag") -> Command:
    """A command whose refusals are one line and an exit code; with `--debug` the traceback as well."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        debug = bool(kwargs.pop("debug", False))
        raise typer.Exit(outcome(lambda: command(*args, **kwargs), program=program, debug=debug))

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
