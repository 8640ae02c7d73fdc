"""What a sweep costs beyond its runs, and how long a thousand stored runs take to be listed and drawn.

Overhead: two workers do runs that do nothing; what a run then takes, and what starting takes, are held against the
seconds that the committed runs of the smoke sweep took. Listing and drawing: a store of a thousand runs, the committed
records under other seeds, is listed as `sweep --list` does, exported, and its figures drawn as `figures` does.
"""

from __future__ import annotations

import io
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.common import store
from experiments.sweep import export, local, status
from experiments.sweep.keys import RunConfig
from experiments.sweep.reader import Reader
from experiments.sweep.store import Store

SOURCE = Path(__file__).parents[1] / "results" / "smoke" / "figure3.json"


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    idle_runs: int = 200
    stored_runs: int = 1000
    workers: int = 2
    seed: int = 0
    overhead_target: float = 0.02
    drawn_target: float = 10.0


SETTINGS = Settings()


def nothing(config: RunConfig, out: Path) -> dict[str, Any]:
    """A run that does nothing."""
    return {"value": config.train["seed"]}


def reseeded(runs: tuple[export.Result, ...], count: int) -> list[tuple[RunConfig, export.Result]]:
    """Configurations of so many runs, those given (of one seed) under new seeds, each with the run it is made from."""
    seeds = (number // len(runs) for number in range(count))
    return [
        (runs[number % len(runs)].config.replace(train={"seed": 1000 + seed}), runs[number % len(runs)])
        for number, seed in enumerate(seeds)
    ]


def idle_seconds(count: int, runs: tuple[export.Result, ...], settings: Settings) -> float:
    """Wall time of so many runs that do nothing, processes and all."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        root = Path(folder)
        opened = Store(root)
        opened.add("smoke/idle", [config for config, _ in reseeded(runs, count)], tier="smoke")
        begun = time.perf_counter()
        done = local.execute(
            root, sweep="smoke/idle", workers=local.Workers(settings.workers), runner="benchmarks.sweeps:nothing"
        )
        seconds = time.perf_counter() - begun
        assert done["done"] == count
    return seconds


def drawn(runs: tuple[export.Result, ...], settings: Settings) -> dict[str, float]:
    """Seconds to list, export and draw the store of many runs."""
    from experiments.figures import gallery  # here: workers, which import this module, draw nothing
    from experiments.figures.build import build

    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        root, results = Path(folder) / "store", Path(folder) / "results"
        pairs = reseeded(runs, settings.stored_runs)
        origin = {config.key: result for config, result in pairs}
        opened = Store(root)
        opened.add("smoke/figure3", [config for config, _ in pairs], tier="smoke", figure="figure3")
        while (claim := opened.claim()) is not None:
            claim.finish(origin[claim.config.key].record, origin[claim.config.key].seconds)
        begun = time.perf_counter()
        reader = Reader(root)
        Console(file=io.StringIO(), width=120).print(status.listing(reader.rows("smoke/figure3")))
        listed = time.perf_counter()
        export.save(export.from_store(reader, "smoke/figure3"), results)
        exported = time.perf_counter()
        built = build(results, results / "figures", resamples=None)
        gallery.write(built, results / "gallery.html")
        ended = time.perf_counter()
    return {"list": listed - begun, "export": exported - listed, "draw": ended - exported}


def main() -> None:
    """Measure, print, store."""
    settings = SETTINGS
    runs = tuple(run for run in export.read(SOURCE).runs if run.config.train["seed"] == settings.seed)
    starting = idle_seconds(settings.workers, runs, settings)
    each = (idle_seconds(settings.idle_runs, runs, settings) - starting) * settings.workers / settings.idle_runs
    work = sum(run.seconds for run in runs)
    overhead = (starting * settings.workers + each * len(runs)) / work
    seconds = drawn(runs, settings)
    total = seconds["list"] + seconds["draw"]
    found = {"starting": starting, "each": each, "runs": len(runs), "work": work, "overhead": overhead}
    store("sweeps", settings, {"overhead": found, "stored": seconds | {"list and draw": total}})


if __name__ == "__main__":
    main()
