"""Workers on this machine: one process each, threads pinned, several per GPU.

The driver starts workers and starts new ones for those that die; the workers take runs from the store by
themselves. The driver holds nothing, so its death loses nothing.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from experiments.sweep.files import FULL_ADVICE
from experiments.sweep.store import MAX_INTERRUPTIONS, Store
from experiments.sweep.worker import FULL, REFUSED
from hessdiag.errors import ConfigurationError, StoreError

FINE = 0


@dataclass(frozen=True)
class Workers:
    """How many workers, and where each computes."""

    count: int
    threads: int = 1
    gpus: tuple[str, ...] = ()

    @classmethod
    def plan(cls, *, workers: int | None = None, threads: int | None = None, per_gpu: int = 1) -> Workers:
        """One worker per core with one thread each, or `per_gpu` on every visible GPU."""
        for name, value in (("--workers", workers), ("--threads", threads), ("--per-gpu", per_gpu)):
            if value is not None and value < 1:
                raise ConfigurationError(f"{name} {value}: at least 1")
        gpus, cores = visible_gpus(), cores_here()
        count = workers or (len(gpus) * per_gpu if gpus else max(1, cores // (threads or 1)))
        return cls(count, threads or max(1, cores // count if gpus else 1), gpus)

    def environment(self, index: int) -> dict[str, str]:
        """What pins worker `index`: its GPU in turn, and the threads of every numerical library."""
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        pins = dict.fromkeys(names, str(self.threads))
        if self.gpus:
            pins["CUDA_VISIBLE_DEVICES"] = self.gpus[index % len(self.gpus)]
        return pins


def cores_here() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus() -> tuple[str, ...]:
    """The GPUs this process may use, named as CUDA_VISIBLE_DEVICES names them."""
    import torch

    number = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = tuple(part.strip() for part in named.split(",") if part.strip())
    return names[:number] if len(names) >= number else tuple(str(index) for index in range(number))


def execute(
    root: Path,
    *,
    sweep: str,
    workers: Workers,
    seeds: Collection[int] | None = None,
    first: int | None = None,
    runner: str = "experiments.sweep.run:run_one",
    retries: int = 0,
    interruptions: int = MAX_INTERRUPTIONS,
    watch: Callable[[], None] | None = None,
    environment: Mapping[str, str] | None = None,
    interval: float = 0.25,
) -> dict[str, int]:
    """Run a registered sweep, or what has these seeds among its first so many runs, to its end; returns how many runs
    are in each state.
    """
    logs = root / "logs"
    logs.mkdir(exist_ok=True)

    def start(index: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "experiments.sweep.worker", str(root), "--sweep", sweep, "--runner", runner]
        command += ["--retries", str(retries), "--interruptions", str(interruptions)]
        if seeds is not None:
            command += ["--seeds", *map(str, seeds)]
        if first is not None:
            command += ["--first", str(first)]
        command += ["--threads", str(workers.threads), "--parent", str(os.getpid())]
        variables = {**os.environ, **workers.environment(index), **(environment or {})}
        with open(logs / f"worker-{index}.log", "ab") as log:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=variables)

    store = Store(root)
    wanted = min(workers.count, store.remaining(sweep, seeds=seeds, first=first, retries=retries))
    crew = {index: start(index) for index in range(wanted)}
    fruitless, claimed = 0, store.claimed(sweep)
    try:
        while crew:
            time.sleep(interval)
            if watch is not None:
                watch()
            for index, process in list(crew.items()):
                code = process.poll()
                if code is None:
                    continue
                del crew[index]
                if code == FULL:
                    raise StoreError(f"store {root}: {FULL_ADVICE}")
                if code == REFUSED:
                    raise StoreError(_last_line(logs / f"worker-{index}.log"))
                before, claimed = claimed, store.claimed(sweep)
                if claimed > before:  # the store itself counts how often a run ends its worker
                    fruitless = 0
                elif code != FINE:
                    fruitless += 1
                if fruitless > 3 * workers.count:
                    line = _last_line(logs / f"worker-{index}.log")
                    raise StoreError(f"workers end before they take a run; the last said: {line}")
                if code != FINE and store.remaining(sweep, seeds=seeds, first=first, retries=retries):
                    crew[index] = start(index)
    finally:
        _end(list(crew.values()))
    return store.counts(sweep)


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    """Ask the workers to give their runs back, and do not wait for ever."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
    deadline = time.monotonic() + 10
    for process in processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
    return lines[-1] if lines else f"a worker ended without a word; see {path}"
