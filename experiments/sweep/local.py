"""Workers on this machine: one process each, threads pinned, several per GPU.

The driver starts workers and starts new ones for those that die; the workers take runs from the store by
themselves. The driver holds nothing, so its death loses nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from experiments.sweep.files import FULL_ADVICE, GoneError
from experiments.sweep.store import MAX_INTERRUPTIONS, Store, deaths, worker_name
from hessdiag.cli.exits import BAD_FILE, OK, UNWRITTEN, USAGE
from hessdiag.errors import ConfigurationError, StoreError
from hessdiag.show.text import counted


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
    tell: Callable[[str], None] | None = None,
    interval: float = 0.25,
) -> dict[str, int]:
    """Run a registered sweep, or what has these seeds among its first so many runs, to its end; returns how many runs
    are in each state.

    `tell` is told in a line what ended a worker that was killed. Where the store is gone, what is under way is
    finished before that is raised.
    """
    logs, store = root / "logs", Store(root, make=False)
    logs.mkdir(exist_ok=True)
    fruitless, claimed, kills = 0, store.claimed(sweep), memory_kills()

    def start(index: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "experiments.sweep.worker", str(root), "--sweep", sweep, "--runner", runner]
        command += ["--retries", str(retries), "--interruptions", str(interruptions)]
        if seeds is not None:
            command += ["--seeds", *map(str, seeds)]
        if first is not None:
            command += ["--first", str(first)]
        command += ["--threads", str(workers.threads), "--parent", str(os.getpid()), "--debug"]
        variables = {**os.environ, **workers.environment(index)}
        with open(logs / f"worker-{index}.log", "ab") as log:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=variables)

    def ended(index: int, process: subprocess.Popen[bytes]) -> bool:
        """See to a worker that has ended; whether another takes its place."""
        nonlocal fruitless, claimed
        store.here()
        code = process.returncode
        if code == UNWRITTEN:
            raise StoreError(f"store {root}: {FULL_ADVICE}")
        if code in (BAD_FILE, USAGE):
            raise StoreError(_last_line(logs / f"worker-{index}.log"))
        if code < 0 and tell is not None:
            tell(_killed(store, sweep, index, process, kills, interruptions))
        before, claimed = claimed, store.claimed(sweep)
        if claimed > before:  # the store itself counts how often a run ends its worker
            fruitless = 0
        elif code != OK:
            fruitless += 1
        if fruitless > 3 * workers.count:
            line = _last_line(logs / f"worker-{index}.log")
            raise StoreError(f"workers end before they take a run; the last said: {line}")
        return code != OK and bool(store.remaining(sweep, seeds=seeds, first=first, retries=retries))

    wanted = min(workers.count, store.remaining(sweep, seeds=seeds, first=first, retries=retries))
    crew = {index: start(index) for index in range(wanted)}
    gone: GoneError | None = None
    try:
        while crew:
            time.sleep(interval)
            if watch is not None:
                watch()
            for index, process in list(crew.items()):
                if process.poll() is None:
                    continue
                del crew[index]
                try:
                    again = ended(index, process)
                except GoneError as error:  # the others may finish, and leave their results in runs/
                    gone, again = error, False
                if again:
                    crew[index] = start(index)
        if gone is not None:
            raise gone
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


def memory_kills() -> int:
    """How many processes the kernel has killed for want of memory since it began; 0 where it does not say."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            name, _, number = line.partition(" ")
            if name == "oom_kill":
                return int(number)
    return 0


def _killed(store: Store, sweep: str, index: int, process: subprocess.Popen[bytes], kills: int, limit: int) -> str:
    """What is known of a worker that a signal ended, in a sentence."""
    number = -process.returncode
    names = {int(one): one.name for one in signal.Signals}
    text = f"worker {index} was killed ({names.get(number, f'signal {number}')}"
    if number == signal.SIGKILL:
        more = memory_kills() - kills
        told = f"the kernel has killed {more} for want of memory meanwhile, fewer --workers leave more to each"
        text += f": {told}" if more else ", for want of memory?"
    for key, config in store.chosen(sweep):
        tried = store.attempts(key)
        if any(one["worker"] == worker_name(process.pid) and one["outcome"] == "interrupted" for one in tried):
            text += f") while it did {key[:8]} {config.label}, which is tried again from its last saved epoch"
            return f"{text}: {deaths(tried)} of at most {counted(limit, 'time')}"
    return f"{text}) and held no run"


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
    return lines[-1] if lines else f"a worker ended without a word; see {path}"
