"""One GPU for a few minutes: what is most worth measuring there, in order, each result stored as it comes.

    1  speed of standard and N-FGSM training beside a plain loop          benchmarks.card throughput
    2  a replicate beside a gradient and a product, GPT of 124M           benchmarks.card nanogpt
    3  N-FGSM on the whole ResNet-18 over max|σ''|, seed after seed       sweeps/campaign/card.toml
    4  norms beside Hutchinson's probes                                   benchmarks.card norms
    5  what an activation costs                                           benchmarks.card table2
    6  norms of transformers                                              benchmarks.transformers
    7  standard training                                                  sweeps/campaign/card_standard.toml

What `results` or `out` already hold is left out, so that the next quarter of an hour goes on where this one ended.
Every part runs in processes of its own, ended when the time is over: what they had stored by then stays. The runs of a
sweep are done one at a time, since training fills the GPU by itself; what is timed has it alone.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.sweep import export, grid
from experiments.sweep.keys import RunConfig
from experiments.sweep.local import cores_here
from experiments.sweep.store import Store
from hessdiag import data
from hessdiag.data.published import SOURCES
from hessdiag.errors import ConfigurationError, DataError
from hessdiag.store.files import BadFileError, write_bytes

Tell = Callable[[str], None]
BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
LEAST = 20.0  # seconds below which no part is begun
WORKERS = 1  # that train and attack at a time: replayed steps fill a GPU, and small kernels beside them wait for it
REHEARSED = 2  # runs of each sweep
LAST = 20  # lines that are told of what a benchmark said
DATA = "cifar10"


@dataclass(frozen=True)
class Part:
    """One thing to do: a sweep, or a module to run."""

    name: str
    sweep: str = ""
    module: str = ""
    words: tuple[str, ...] = ()


PARTS = (
    Part("speed of training", module="benchmarks.card", words=("throughput",)),
    Part("a replicate of a GPT", module="benchmarks.card", words=("nanogpt",)),
    Part("N-FGSM", sweep="campaign/card"),
    Part("norms of ResNet-18", module="benchmarks.card", words=("norms",)),
    Part("what an activation costs", module="benchmarks.card", words=("table2",)),
    Part("norms of transformers", module="benchmarks.transformers"),
    Part("standard training", sweep="campaign/card_standard"),
)


@dataclass(frozen=True)
class Places:
    """Where things lie: what is known already, what is new, and what may be lost."""

    results: Path
    out: Path
    store: Path


def run(
    places: Places, *, seconds: float, folder: Path | None, rehearse: bool, tell: Tell, workers: int = WORKERS
) -> int:
    """Do the parts in order until the time is over; returns how many failed."""
    begun = time.monotonic()
    Store(places.store)  # before anything else lies there
    found = unpacked(folder, places.store / "data", invent=rehearse, tell=tell)
    if found is not None:
        os.environ["HESSDIAG_DATA"] = str(found)
    failures = 0
    for part in PARTS:
        left = seconds - (time.monotonic() - begun)
        if left < min(LEAST, seconds / 2):
            tell(f"{part.name}: no time left")
            continue
        if part.sweep and found is None:
            tell(f"{part.name}: left out, {DATA} is not here")
            continue
        sweep = grid.load(part.sweep) if part.sweep else None
        if sweep is not None:
            if rehearse:
                sweep = replace(sweep, runs=tuple(shrunk(run) for run in sweep.runs[:REHEARSED]))
            failures += trained(sweep, places, left, workers=1 if rehearse else workers, name=part.name, tell=tell)
        elif (BENCHMARKS / f"{part.module.rpartition('.')[2]}.py").is_file():
            failures += measured(part, places, left, rehearse=rehearse, tell=tell)
        else:
            tell(f"{part.name}: left out, there is no {part.module} yet")
    return failures


def shrunk(config: RunConfig) -> RunConfig:
    """The same run at a size that a CPU does in seconds, to see that every step of it works.

    The attack is so strong that nothing stands after its first hundred steps.
    """
    options = {**config.train["network_options"], "width": 2}
    attack = {name: min(config.attack[name], 4) for name in ("aa2_samples", "aa_samples", "pgd_samples")}
    return config.replace(
        train={"network_options": options, "train_samples": 48, "epochs": 1, "batch_size": 16, "compile": False},
        attack={**attack, "eps": "0.5"},
        measure={"samples": 4, "batch_size": 4, "rtol": 0.5, "min_replicates": 4, "plugin_probes": 2},
    )


def unpacked(folder: Path | None, scratch: Path, *, invent: bool, tell: Tell) -> Path | None:
    """A folder from which the data are read fast: the parts of `folder` unpacked into `scratch`, unless they were; or
    where they are by default. None where they are not whole; with `invent` 64 random images in their place.
    """
    ready = [scratch / f"{DATA}-{split}.npz" for split in ("train", "test")]
    if all(path.is_file() for path in ready):
        return scratch
    root = folder or data.default_root()
    begin = time.monotonic()
    try:
        sets = [data.load(DATA, split=split, root=root) for split in ("train", "test")]
    except DataError as error:
        if not invent:
            tell(f"note: {error}")
            return None
        tell("note: random images in place of data")
        generator = np.random.default_rng(0)
        arrays = [(generator.integers(256, size=(64, 32, 32, 3)), np.arange(64) % SOURCES[DATA].num_classes)] * 2
    else:
        if folder is None or (folder / ready[0].name).is_file():
            return root
        arrays = [(found.inputs.permute(0, 2, 3, 1).numpy(), found.targets.numpy()) for found in sets]
    scratch.mkdir(parents=True, exist_ok=True)
    for path, (images, labels) in zip(ready, arrays, strict=True):
        packed = io.BytesIO()
        np.savez(packed, images=images.astype(np.uint8), labels=labels)
        try:
            write_bytes(path, packed.getbuffer())
        except BadFileError as reason:
            raise DataError(f"{path}: {reason}") from None
    tell(f"{DATA} unpacked in {time.monotonic() - begin:.0f} s")
    return scratch


def trained(sweep: grid.Sweep, places: Places, seconds: float, *, workers: int, name: str, tell: Tell) -> int:
    """The runs that no results have yet, in order, by so many workers; exported with those before after each.

    What failed in an earlier call is tried again.
    """
    before = {run.key: run for folder in (places.results, places.out) for run in _exported(folder, sweep.name)}
    todo = [run for run in sweep.runs if run.key not in before]
    if not todo:
        tell(f"{name}: all {len(sweep.runs)} runs are there")
        return 0
    store = Store(places.store)
    store.add(sweep.name, todo, tier=sweep.tier, figure=sweep.figure, title=sweep.title)
    failed = {row.key: row.failures for row in store.rows(sweep.name)}
    count = min(workers, len(todo))
    words = [sys.executable, "-m", "experiments.sweep.worker", str(places.store), "--sweep", sweep.name]
    words += ["--first", str(len(todo)), "--threads", str(max(1, cores_here() // count)), "--parent", str(os.getpid())]
    words += ["--retries", str(max(failed.values())), "--debug"]
    running = [subprocess.Popen(words, stdin=subprocess.DEVNULL) for _ in range(count)]
    end, told, failures = time.monotonic() + seconds, set[tuple[str, int]](), 0
    late = False
    try:
        over = False
        while not over:
            late = time.monotonic() > end
            over = late or all(worker.poll() is not None for worker in running)
            for row in store.rows(sweep.name):
                fresh = row.state == "done" or (row.state == "failed" and row.failures > failed[row.key])
                if not fresh or (row.key, row.failures) in told:
                    continue
                told.add((row.key, row.failures))
                if row.state == "failed":
                    failures += 1
                    tell(f"{name}: {row.label}: failed: {(row.error or '').strip()}")
                    continue
                record = row.record or {}
                before[row.key] = export.Result(row.key, row.config, "", row.seconds or 0.0, record)
                _save(sweep, before, places.out)
                tell(f"{name}: {row.config.train['activation']}: {_sentence(record)}, {row.seconds or 0:.0f} s")
            if not over:
                time.sleep(0.2)
    finally:
        if late and any(worker.poll() is None for worker in running):
            tell(f"{name}: the time is over")
        ended = [code for code in _ended(running) if code]
        for code in ended:
            tell(f"{name}: a worker ended with {code}")
    return failures + len(ended)


def _ended(workers: list[subprocess.Popen[bytes]]) -> list[int]:
    """The exit codes of those that had ended by themselves; the others are told to end, all at once."""
    under_way = [worker for worker in workers if worker.poll() is None]
    for worker in under_way:
        worker.terminate()
    patience = time.monotonic() + 10
    for worker in under_way:
        try:
            worker.wait(max(0.0, patience - time.monotonic()))
        except subprocess.TimeoutExpired:  # deep in a kernel
            worker.kill()
            worker.wait()
    return [worker.returncode for worker in workers if worker not in under_way]


def _exported(folder: Path, name: str) -> tuple[export.Result, ...]:
    path = folder / f"{name}.json"
    return export.read(path).runs if path.is_file() else ()


def _save(sweep: grid.Sweep, done: dict[str, export.Result], out: Path) -> None:
    """All that is known of the sweep, in its order; what was there before and is no longer in it comes last."""
    keys = [run.key for run in sweep.runs]
    known = [done[key] for key in keys if key in done] + [run for key, run in done.items() if key not in keys]
    missing = sum(key not in done for key in keys)
    export.save(export.SweepResults(sweep.name, sweep.figure, sweep.tier, sweep.title, missing, tuple(known)), out)


def _sentence(record: dict[str, Any]) -> str:
    shown = []
    for name, label in (("clean_accuracy", "clean"), ("aa2", "AA-2"), ("pgd", "PGD-10")):
        if record.get(name):
            shown.append(f"{label} {100 * record[name]['value']:.1f}%")
    return ", ".join(shown)


def measured(part: Part, places: Places, seconds: float, *, rehearse: bool, tell: Tell) -> int:
    """Run a benchmark's module; it stores each row as it comes, and what it printed is told."""
    words = [sys.executable, "-m", part.module, *part.words, "--out", str(places.out / "card")]
    if rehearse:
        words += ["--device", "cpu"]
    try:
        found = subprocess.run(words, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired as error:
        printed = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        tell("\n".join([f"{part.name}: the time is over", *_last(printed)]))
        return 0
    said = [*_last(found.stdout), *(_last(found.stderr) if found.returncode else [])]
    tell("\n".join([f"{part.name}:" if said else f"{part.name}: nothing new", *said]))
    return int(found.returncode != 0)


def _last(text: str) -> list[str]:
    """The last lines: what was measured is stored, and the whole would hide what was told before it."""
    return text.strip().splitlines()[-LAST:]


def check(*, seconds: float, rehearse: bool) -> None:
    """Refuse what cannot be meant."""
    if not seconds > 0:
        raise ConfigurationError(f"--seconds {seconds:g}: more than 0")
    if not rehearse and not torch.cuda.is_available():
        raise ConfigurationError("no GPU is visible here; --rehearse goes through every part at a tiny size on the CPU")
