"""Peak memory of one propagation measurement of ResNet-18 against one training step at the same batch.

Every number is the peak resident size (ru_maxrss) of a fresh process that does nothing else, less that of a process
that only imports the same packages and builds the same model and data. The training step is SGD with momentum:
forward, backward, update, twice, since the second holds the momentum. The measurement is `hessdiag.measure` as a
user calls it, with its pilot, its audit and its checks. Inputs are random: memory does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import hessdiag as hd
from benchmarks.common import median, store
from hessdiag import networks


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    network: str = "resnet18"
    activation: str = "rct:beta=1,alpha=14"
    batch: int = 128
    replicates: int = 2
    repeats: int = 1
    target: float = 3.0


SETTINGS = Settings()
TASKS = ("nothing", "training", "measurement")


def work(task: str, settings: Settings) -> None:
    """One task, in this process."""
    model = networks.build(settings.network, activation=settings.activation, seed=0)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(settings.batch, 3, 32, 32, generator=generator)
    targets = torch.randint(10, (settings.batch,), generator=generator)
    if task == "training":
        optimiser = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        for _ in range(2):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimiser.step()
    elif task == "measurement":
        measured = hd.measure(
            hd.Objective(model.eval()),
            [(inputs, targets)],
            method="propagation",
            min_replicates=settings.replicates,
            max_replicates=settings.replicates,
        )
        print(json.dumps({"rms": measured.rms}), file=sys.stderr)


def peak(task: str, settings: Settings) -> tuple[float, float]:
    """(MiB, seconds) of a fresh process doing `task`."""
    begun = time.perf_counter()
    flags = [f"--{key}={getattr(settings, key)}" for key in ("batch", "replicates")]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", "--task", task, *flags], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"task {task!r} failed: {done.stderr[-2000:]}")
    return float(done.stdout.splitlines()[-1]) / 1024, time.perf_counter() - begun


def main() -> None:
    """Measure, print and store; with --task do that task here and print the peak in KiB."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=TASKS)
    parser.add_argument("--batch", type=int, default=SETTINGS.batch)
    parser.add_argument("--replicates", type=int, default=SETTINGS.replicates)
    parser.add_argument("--repeats", type=int, default=SETTINGS.repeats)
    given = parser.parse_args()
    settings = Settings(batch=given.batch, replicates=given.replicates, repeats=given.repeats)
    if given.task:
        work(given.task, settings)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # KiB on Linux
        return
    found: dict[str, list[float]] = {task: [] for task in TASKS}
    for _ in range(settings.repeats):
        for task in TASKS:
            mib, seconds = peak(task, settings)
            found[task].append(mib)
            print(f"{task:12} {mib:8.0f} MiB peak, {seconds:6.1f} s", flush=True)
    rows = list(zip(*(found[task] for task in TASKS)))
    above = median([(m - n) / (t - n) for n, t, m in rows])
    whole = median([m / t for n, t, m in rows])
    results: dict[str, Any] = {"peak_mib": found, "ratio_above_base": above.value, "ratio_whole": whole.value}
    store("memory", settings, results)


if __name__ == "__main__":
    main()
