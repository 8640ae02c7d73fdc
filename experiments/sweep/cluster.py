"""Workers on a Ray cluster: the driver holds the claims and writes the store, tasks on any node do the runs.

Only the driver touches the store, so nodes need no shared file system; a run's files other than its record
stay on the node that made them. A node that dies takes its tasks with it: the driver counts an interruption
and gives the run to another node. Ray is optional (`pip install 'hessdiag[ray]'`).
"""

from __future__ import annotations

import contextlib
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from experiments.sweep.files import FULL_ADVICE, disk_full
from experiments.sweep.keys import RunConfig
from experiments.sweep.store import MAX_INTERRUPTIONS, Claim, Store
from experiments.sweep.worker import load_runner
from hessdiag.errors import ConfigurationError, StoreError


def connect(address: str | None) -> Any:
    """The ray module, connected; `address` None starts a cluster on this machine alone."""
    try:
        import ray
    except ImportError as error:
        raise ConfigurationError("--executor ray: ray is not installed; pip install 'ray>=2.40'") from error
    if not ray.is_initialized():
        try:
            ray.init(address=address, log_to_driver=False, logging_level="error")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigurationError(f"--ray-address {address}: {error}") from error
    return ray


def _do(runner: str, config: dict[str, Any], threads: int) -> tuple[str, Any, float]:
    """One run on some node: ("done", record, seconds), ("failed", text, seconds) or ("full", text,
    seconds).
    """
    begin = time.monotonic()
    try:
        with contextlib.suppress(ImportError):
            import torch

            torch.set_num_threads(threads)
        with tempfile.TemporaryDirectory(prefix="run-") as folder:
            record = load_runner(runner)(RunConfig.from_dict(config), Path(folder))
    except Exception as error:
        text = f"{type(error).__name__}: {error}\n\n{''.join(traceback.format_exception(error))}"
        return ("full" if disk_full(error) else "failed"), text, time.monotonic() - begin
    return "done", record, time.monotonic() - begin


def execute(
    root: Path,
    *,
    sweep: str,
    seeds: Collection[int] | None = None,
    first: int | None = None,
    runner: str = "experiments.sweep.run:run_one",
    address: str | None = None,
    threads: int = 1,
    per_gpu: int = 1,
    retries: int = 0,
    interruptions: int = MAX_INTERRUPTIONS,
    watch: Callable[[], None] | None = None,
) -> dict[str, int]:
    """Run a registered sweep, or these seeds of its first so many runs, on a cluster.

    A run takes `threads` cores and, where the cluster has GPUs, the share 1/`per_gpu` of one.
    """
    ray = connect(address)
    gpus = _share(ray, per_gpu)
    if not _slots(ray, threads, gpus):
        raise ConfigurationError(
            f"--threads {threads}: no node of the cluster has so many cores"
            + (" and a GPU" if gpus else "") + "; take fewer"
        )  # fmt: skip
    task = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=0)(_do)
    running: dict[Any, Claim] = {}
    store = Store(root)
    try:
        while running or store.remaining(sweep, seeds=seeds, first=first, retries=retries):
            while len(running) < _slots(ray, threads, gpus) + 1:  # one more, so that no slot waits for the driver
                claim = store.claim(
                    sweep=sweep, seeds=seeds, first=first, retries=retries, interruptions=interruptions
                )  # fmt: skip
                if claim is None:
                    break
                running[task.remote(runner, claim.config.to_dict(), threads)] = claim
            if not running:
                time.sleep(0.5)  # others hold what is left
                continue
            ready, _ = ray.wait(list(running), timeout=0.5)
            for reference in ready:
                _record(ray, reference, running.pop(reference))
            if watch is not None:
                watch()
    finally:
        for reference, claim in running.items():
            with contextlib.suppress(Exception):
                ray.cancel(reference, force=True)
            with contextlib.suppress(StoreError):
                claim.release("the driver stopped")
    return store.counts(sweep)


def places(address: str | None, threads: int, per_gpu: int) -> int:
    """How many runs the cluster does side by side as it is now."""
    ray = connect(address)
    return _slots(ray, threads, _share(ray, per_gpu))


def _alive(ray: Any) -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _share(ray: Any, per_gpu: int) -> float:
    """The part of a GPU that a run asks for: none where no node has one, whatever this machine has."""
    return 1.0 / per_gpu if any(node.get("GPU", 0) for node in _alive(ray)) else 0.0


def _slots(ray: Any, threads: int, gpus: float) -> int:
    """How many runs fit on the nodes that are alive now."""
    fits = []
    for node in _alive(ray):
        fit = int(node.get("CPU", 0) // threads)
        # a fifth goes five times into one, though 1 // 0.2 is 4 in floating point
        fits.append(min(fit, int(node.get("GPU", 0) / gpus + 1e-9)) if gpus else fit)
    return sum(fits)


def _record(ray: Any, reference: Any, claim: Claim) -> None:
    """Write down what a task returned, or that its process or node died."""
    try:
        outcome, value, seconds = ray.get(reference)
    except ray.exceptions.RayError as error:
        claim.interrupt(f"{type(error).__name__}")
        return
    try:
        if outcome == "done":
            claim.finish(value, seconds)
        elif outcome == "full":
            claim.release("the node's disk was full")
            raise StoreError(f"on a node of the cluster {FULL_ADVICE}")
        else:
            claim.fail(value)
    finally:
        claim.let_go()
