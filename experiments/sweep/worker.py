"""One worker: take a run, do it, record it, take the next.

    python -m experiments.sweep.worker STORE --sweep NAME --runner experiments.sweep.run:run_one

A thread keeps the lease alive and watches two things: that the run is still this worker's, and that the
driver that started it still lives. When either ends, so does the worker, at once: nobody wants orphans that
train through the night.
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
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from experiments.sweep.files import FULL_ADVICE, disk_full, read_result, write_config, write_result
from experiments.sweep.keys import RunConfig
from experiments.sweep.owner import Owner
from experiments.sweep.store import LEASE_SECONDS, MAX_INTERRUPTIONS, Claim, Store
from experiments.trainer.memory import keep_freed_memory
from hessdiag.errors import ConfigurationError, StoreError

Runner = Callable[[RunConfig, Path], dict[str, Any]]
# Exit codes: a refusal, told on standard error; a full disk, on which nothing can be told; the run went to somebody
# else; the driver is gone.
REFUSED, FULL, LOST, ORPHANED = 3, 74, 75, 76


def load_runner(name: str) -> Runner:
    """The function that `module:function` names; it does one run in a directory and returns its record."""
    module, _, function = name.partition(":")
    try:
        runner = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(f"runner {name!r}: {error}; name it as package.module:function") from error
    return runner  # type: ignore[no-any-return]


class Heart(threading.Thread):
    """Beats while a claim is held; ends the process when the claim or the driver is gone."""

    def __init__(self, root: Path, claim: Claim, *, lease: float, parent: int | None) -> None:
        super().__init__(daemon=True)
        self.root, self.claim, self.lease, self.parent = root, claim, lease, parent
        self.stopped = threading.Event()

    def run(self) -> None:
        """Check the driver every second and extend the lease every sixth of it.

        The store is opened for each beat: one that cannot be opened now (a full disk, a long lock) may be at the next.
        """
        beat = time.monotonic()
        while not self.stopped.wait(min(1.0, self.lease / 6)):
            if self.parent is not None and os.getppid() != self.parent:
                with contextlib.suppress(StoreError), Store(self.root) as store:
                    store.release(self.claim, "its driver died")
                os._exit(ORPHANED)
            if time.monotonic() - beat < self.lease / 6:
                continue
            with contextlib.suppress(StoreError), Store(self.root) as store:
                held = store.heartbeat(self.claim, lease=self.lease)
                beat = time.monotonic()
                if not held and not self.stopped.is_set():
                    os._exit(LOST)

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """Beat while the block runs."""
        self.start()
        try:
            yield
        finally:
            self.stopped.set()
            self.join()


def do(store: Store, claim: Claim, runner: Runner, *, lease: float = LEASE_SECONDS, parent: int | None = None) -> str:
    """Do one claimed run and record it; the outcome is "done", "failed", "adopted" or "lost"."""
    folder = store.folder(claim.key)
    found = read_result(folder, claim.config)
    if found is not None:  # its last holder died between the file and the store
        return "adopted" if store.finish(claim, *found) else "lost"
    begin = time.monotonic()
    try:
        with Heart(store.root, claim, lease=lease, parent=parent).beating():
            write_config(folder, claim.config)
            record = runner(claim.config, folder)
        seconds = time.monotonic() - begin
        write_result(folder, claim.config, record, seconds)
    except (KeyboardInterrupt, SystemExit):
        store.release(claim, "told to stop")
        raise
    except Exception as error:
        if disk_full(error):
            with contextlib.suppress(StoreError):  # if even that does not fit, the next claim takes the run back
                store.release(claim, "the disk was full")
            raise StoreError(f"store {store.root}: {FULL_ADVICE}") from error
        text = f"{type(error).__name__}: {error}\n\n{''.join(traceback.format_exception(error))}"
        return "failed" if store.fail(claim, text) else "lost"
    return "done" if store.finish(claim, record, seconds) else "lost"


def work(
    root: Path,
    runner: Runner,
    *,
    sweep: str | None = None,
    seeds: Collection[int] | None = None,
    first: int | None = None,
    retries: int = 0,
    lease: float = LEASE_SECONDS,
    interruptions: int = MAX_INTERRUPTIONS,
    poll: float = 0.5,
    parent: int | None = None,
) -> dict[str, int]:
    """Do runs until none is left to wait for; returns how often each outcome came."""
    outcomes: dict[str, int] = {}
    owner = Owner.current().text
    with Store(root) as store:
        while store.remaining(sweep, seeds=seeds, first=first, retries=retries):
            claim = store.claim(
                owner, sweep=sweep, seeds=seeds, first=first, retries=retries, lease=lease, interruptions=interruptions
            )
            if claim is None:  # others hold what is left; they may die yet
                if parent is not None and os.getppid() != parent:
                    raise SystemExit(ORPHANED)
                time.sleep(poll)
                continue
            outcome = do(store, claim, runner, lease=lease, parent=parent)
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
    parser.add_argument("--lease", type=float, default=LEASE_SECONDS)
    parser.add_argument("--interruptions", type=int, default=MAX_INTERRUPTIONS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--parent", type=int)
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _stop)
    try:
        keep_freed_memory()
        runner = load_runner(options.runner)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(options.threads)
            # Below 1e-38 is zero: what saturated activations leave there costs steps of a curvature of 50 most of their time.
            sys.modules["torch"].set_flush_denormal(True)
        work(
            options.store,
            runner,
            sweep=options.sweep,
            seeds=options.seeds,
            first=options.first,
            retries=options.retries,
            lease=options.lease,
            interruptions=options.interruptions,
            parent=options.parent,
        )
    except (StoreError, ConfigurationError) as error:
        try:
            print(error, file=sys.stderr, flush=True)
        except OSError:  # a file on that same disk; what is left in the buffer would spoil the exit code
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
        return FULL if disk_full(error) else REFUSED
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
