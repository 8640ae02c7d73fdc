"""One worker: take a run, do it, record it, take the next.

    python -m experiments.sweep.worker STORE --sweep NAME --runner experiments.sweep.run:run_one

As many as like work on one store, on their own or for a driver.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from types import FrameType
from typing import Any

from experiments.sweep.files import FULL_ADVICE, disk_full
from experiments.sweep.keys import RunConfig
from experiments.sweep.store import MAX_INTERRUPTIONS, Claim, Store
from experiments.trainer.memory import keep_freed_memory
from hessdiag.cli.exits import LOST, OK, UNWRITTEN, complain, outcome
from hessdiag.errors import ConfigurationError, StoreError

Runner = Callable[[RunConfig, Path], dict[str, Any]]
# Exit codes are those of both programs (`hessdiag.cli.exits`): UNWRITTEN is a full disk, on which nothing can be told,
# LOST that the driver is gone.


def load_runner(name: str) -> Runner:
    """The function that `module:function` names; it does one run in a directory and returns its record."""
    module, _, function = name.partition(":")
    try:
        runner = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(f"runner {name!r}: {error}; name it as package.module:function") from error
    return runner  # type: ignore[no-any-return]


def follow(driver: int, held: list[Claim]) -> None:
    """End this process within a second of its driver, with the run it holds given back: nobody wants orphans that train
    through the night.
    """

    def watch() -> None:
        while os.getppid() == driver:
            time.sleep(1.0)
        for claim in held:
            with contextlib.suppress(StoreError):
                claim.note("released", "its driver died")
        os._exit(LOST)

    threading.Thread(target=watch, daemon=True).start()


def do(claim: Claim, runner: Runner) -> str:
    """Do one claimed run and record it; the outcome is "done" or "failed"."""
    begin = time.monotonic()
    try:
        claim.finish(runner(claim.config, claim.folder), time.monotonic() - begin)
    except (KeyboardInterrupt, SystemExit):
        claim.release("told to stop")
        raise
    except Exception as error:
        if disk_full(error):
            with contextlib.suppress(StoreError):  # if even that does not fit, the next claim takes the run back
                claim.release("the disk was full")
            raise StoreError(f"store {claim.root}: {FULL_ADVICE}") from error
        claim.fail(f"{type(error).__name__}: {error}\n\n{''.join(traceback.format_exception(error))}")
        return "failed"
    return "done"


def work(
    root: Path,
    runner: Runner,
    *,
    sweep: str | None = None,
    seeds: Collection[int] | None = None,
    first: int | None = None,
    retries: int = 0,
    interruptions: int = MAX_INTERRUPTIONS,
    driver: int | None = None,
) -> dict[str, int]:
    """Do runs until none is left to wait for; returns how often each outcome came."""
    outcomes: dict[str, int] = {}
    store, held = Store(root, make=False), list[Claim]()
    if driver is not None:
        follow(driver, held)
    while store.remaining(sweep, seeds=seeds, first=first, retries=retries):
        claim = store.claim(sweep=sweep, seeds=seeds, first=first, retries=retries, interruptions=interruptions)
        if claim is None:  # others hold what is left; they may die yet
            time.sleep(0.5)
            continue
        held[:] = [claim]
        outcome = do(claim, runner)
        held.clear()
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    return outcomes


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main(arguments: list[str] | None = None) -> int:
    """Command line of one worker; the local executor starts these."""
    parser = argparse.ArgumentParser(prog="python -m experiments.sweep.worker", description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("--sweep")
    parser.add_argument("--seeds", type=int, nargs="*")
    parser.add_argument("--first", type=int)
    parser.add_argument("--runner", default="experiments.sweep.run:run_one")
    parser.add_argument("--retries", type=int, default=0)
    parser.add_argument("--interruptions", type=int, default=MAX_INTERRUPTIONS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--parent", type=int)
    parser.add_argument("--debug", action="store_true", help="a traceback before the line that ends it")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _stop)
    return outcome(lambda: _work(options), program="experiments", debug=options.debug)


def _work(options: argparse.Namespace) -> int:
    """The runs of one worker; OK, or UNWRITTEN on a full disk."""
    try:
        keep_freed_memory()
        runner = load_runner(options.runner)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(options.threads)
        work(
            options.store,
            runner,
            sweep=options.sweep,
            seeds=options.seeds,
            first=options.first,
            retries=options.retries,
            interruptions=options.interruptions,
            driver=options.parent,
        )
    except StoreError as error:
        if not disk_full(error):
            raise
        try:
            complain(str(error), program="experiments")
        except OSError:  # a file on that same disk; what is left in the buffer would spoil the exit code
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
        return UNWRITTEN
    return OK


if __name__ == "__main__":
    sys.exit(main())
