"""`python -m experiments sweep FILE`: run a sweep, resume it, export its results."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from experiments.commands.common import Results, Seeds, StoreFolder
from experiments.sweep import cluster, export, grid, local, preflight, records, status
from experiments.sweep.cost import check_budget, estimate
from experiments.sweep.keys import RunConfig
from experiments.sweep.reader import DAMAGED, MARK, Reader
from experiments.sweep.store import Store
from hessdiag.cli.exits import OK, complain
from hessdiag.cli.exits import WIDE as SHORT
from hessdiag.errors import ConfigurationError, HessdiagError, StoreError, UnknownNameError, nearest
from hessdiag.show.text import counted

EXECUTORS = ("local", "ray")


def command(
    files: Annotated[list[Path], typer.Argument(help="Sweeps by file or name: smoke/figure3, mine.toml.")],
    store: StoreFolder = Path("runs/sweeps"),
    executor: Annotated[str, typer.Option(help="local: processes here; ray: a cluster.")] = "local",
    workers: Annotated[int | None, typer.Option(help="Processes; one per core or GPU by default.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of each run.")] = None,
    per_gpu: Annotated[int, typer.Option(help="Runs side by side on one GPU.")] = 1,
    ray_address: Annotated[str | None, typer.Option(help="A running cluster; by default one on this machine.")] = None,
    seeds: Seeds = None,
    stage: Annotated[int | None, typer.Option(help="The last stage to do, where a file has several.")] = None,
    retries: Annotated[int, typer.Option(help="How often a failed run is tried again.")] = 0,
    budget: Annotated[float | None, typer.Option(help="Refuse to start what takes longer, in minutes.")] = None,
    pilot: Annotated[bool, typer.Option(help="Time a few steps first where no timing is known.")] = True,
    adopt: Annotated[bool, typer.Option(help="Take over the runs that --results holds.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Say what would be done and what it costs, and stop.")] = False,
    list_runs: Annotated[bool, typer.Option("--list", help="List the runs with what came out, and stop.")] = False,
    results: Results = Path("results"),
    exporting: Annotated[bool, typer.Option("--export/--no-export", help="Write results/TIER/NAME.json.")] = False,
    only_export: Annotated[bool, typer.Option(help="Export what the store holds, and stop.")] = False,
) -> int:
    """Run every sweep named; what is finished is skipped, so the same command goes on after an interruption.

    Exit codes as of hessdiag: 0 done; 1 some runs failed or some networks did not learn; 2 usage; 3 bad file.

    Example: python -m experiments sweep experiments/sweeps/smoke/figure3.toml --seeds 0,1,2 --export
    """
    if executor not in EXECUTORS:
        raise UnknownNameError(f"--executor {executor!r}; {nearest(executor, list(EXECUTORS))}")
    if retries < 0:
        raise ConfigurationError(f"--retries {retries}: not negative")
    if budget is not None and not budget > 0:
        raise ConfigurationError(f"--budget {budget:g}: minutes, more than 0")
    if executor == "ray" and workers is not None:
        raise ConfigurationError("--workers is of --executor local: a cluster does as many runs as fit (--threads)")
    sweeps = [grid.load(path, seeds=_seeds(seeds), stage=stage) for path in files]
    names = [sweep.name for sweep in sweeps]
    for sweep, path in zip(sweeps, files, strict=True):
        if names.count(sweep.name) > 1:
            raise ConfigurationError(f"sweep {path}: another file named here makes {sweep.name} too; rename one")
    show = Console(stderr=True, soft_wrap=True)
    plan = local.Workers.plan(workers=workers, threads=threads, per_gpu=per_gpu)
    if executor == "local" and per_gpu > 1 and not plan.gpus and not dry_run:
        raise ConfigurationError(f"--per-gpu {per_gpu}: no GPU is visible here; leave it out, or see to the driver")
    former = (list_runs or only_export) and not adopt and Reader(store).former  # there must be one
    if not (list_runs or only_export):
        preflight.check(sweeps, tell=show.print if dry_run or executor == "ray" else None)
    if exporting or only_export:
        export.check_folder(results)
    if executor == "ray" and not (dry_run or list_runs or only_export):
        cluster.connect(ray_address)
    exports = export.finished(results) if adopt else {}
    if not dry_run and not former:
        opened = Store(store)
        for sweep in sweeps:
            opened.add(
                sweep.name, sweep.runs, tier=sweep.tier, figure=sweep.figure, title=sweep.title,
                variants=sweep.variants, later=sweep.later,
            )  # fmt: skip
            for row in () if list_runs or only_export else opened.requeue_damaged(sweep.name):
                print(f"{sweep.name}: {row.key[:8]} {row.label} is {row.error}; it is done again", file=sys.stderr)
            for path, number in Counter(export.adopt(opened, sweep.runs, exports)).items():
                print(f"{sweep.name}: {counted(number, 'run')} taken over from {path}", file=sys.stderr)
    if list_runs or only_export:
        reader = Reader(store)
        for sweep in sweeps:
            if list_runs:
                Console().print(status.listing(reader.rows(sweep.name)))
            if only_export:
                print(export.publish(reader, sweep.name, results))
        return 0
    failures = unlearned = 0
    try:
        for sweep in sweeps:
            outcome = _run(
                sweep, store, plan, show, executor=executor, address=ray_address, per_gpu=per_gpu, retries=retries,
                budget=budget, pilot=pilot, dry_run=dry_run, results=results, exporting=exporting,
                adopted=exports.keys(),
            )  # fmt: skip
            failures, unlearned = failures + outcome[0], unlearned + outcome[1]
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; what is done is kept, and the same command goes on") from None
    return SHORT if failures or unlearned else OK


def _run(
    sweep: grid.Sweep,
    store: Path,
    plan: local.Workers,
    show: Console,
    *,
    executor: str,
    address: str | None,
    per_gpu: int,
    retries: int,
    budget: float | None,
    pilot: bool,
    dry_run: bool,
    results: Path,
    exporting: bool,
    adopted: Collection[str],
) -> tuple[int, int]:
    """How many runs failed, and how many are done without having learned."""
    rows = Reader(store).rows(records=False) if (store / MARK).exists() else []  # a dry run makes none
    own = [(row.config, row.seconds) for row in rows if row.state == "done" and row.seconds]
    finished = {row.key for row in rows if row.state == "done"} | set(adopted)
    try:
        exported = export.timings(export.read_all(results))
    except ConfigurationError as error:  # they serve the estimate only
        exported = []
        show.print(f"note: {error}", markup=False)
    known = [("this store", own), ("exported results", exported)]
    measure = _timer(sweep.name, plan.threads, show) if pilot else None
    given_up = [row.key for row in rows if row.state == "failed" and row.failures > retries]
    cost = estimate(sweep.runs, finished, known, failed=given_up, pilot=measure)
    side = plan.count if executor == "local" or dry_run else cluster.places(address, plan.threads, per_gpu)
    show.print(f"{sweep.name}: {sweep.title}\n  {cost.sentence(side)}", markup=False)
    check_budget(cost, side, budget)
    if dry_run:
        return 0, 0
    seeds = sorted({run.train["seed"] for run in sweep.runs})
    first = len(sweep.runs) if sweep.later else None
    reader = Reader(store)
    with Live(console=show, refresh_per_second=2, transient=True) as live:
        watch = _watcher(live, reader, sweep.name)
        if executor == "local":
            counts = local.execute(
                store, sweep=sweep.name, seeds=seeds, first=first, workers=plan, retries=retries, watch=watch,
                tell=lambda text: show.print(f"{sweep.name}: {text}", markup=False),
            )  # fmt: skip
        else:
            counts = cluster.execute(
                store, sweep=sweep.name, seeds=seeds, first=first, address=address, threads=plan.threads,
                per_gpu=per_gpu, retries=retries, watch=watch,
            )  # fmt: skip
    rows = [row for row in reader.rows(sweep.name) if row.state == DAMAGED or row.config.train["seed"] in seeds]
    dead = [row for row in rows if row.record and records.unlearned(row.record, str(row.config.train.get("data")))]
    told = f", {len(dead)} did not learn" if dead else ""
    print(f"{sweep.name}: {counts['done']} done, {counts['failed']} failed{told}")
    for row in dead:
        print(f"  {row.key[:8]} {row.label}: {records.reason(row.record or {})}", file=sys.stderr)
    failed = [row for row in rows if row.state in ("failed", DAMAGED)]
    for row in failed:
        print(f"  failed {row.key[:8]} {row.label}: {(row.error or '').splitlines()[0]}", file=sys.stderr)
    if failed:
        times = max(row.failures for row in failed)
        print(f"  the same command with --retries {times} tries them once more", file=sys.stderr)
    if exporting:
        try:
            print(export.publish(reader, sweep.name, results))
        except StoreError as error:  # the next sweep can be run all the same
            complain(str(error), program="experiments")
            return counts["failed"] + 1, len(dead)
    return counts["failed"], len(dead)


def _timer(name: str, threads: int, show: Console) -> Callable[[RunConfig], float | None]:
    """The pilot, announced, since it may take a minute; None where no run can begin: the runs will say why."""

    def measure(config: RunConfig) -> float | None:
        from experiments.sweep.pilot import pilot

        show.print(f"{name}: timing a few steps first; --no-pilot leaves it out", markup=False)
        try:
            return pilot(config, threads=threads)
        except HessdiagError as error:
            show.print(f"note: not timed ({error})", markup=False)
            return None

    return measure


def _watcher(live: Live, reader: Reader, name: str) -> Callable[[], None]:
    """Refresh the table at most once a second."""
    last = [0.0]

    def watch() -> None:
        if time.monotonic() - last[0] > 1.0:
            last[0] = time.monotonic()
            with contextlib.suppress(StoreError):  # the picture may wait; the runs go on
                live.update(status.render(reader, name))

    return watch


def _seeds(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigurationError(f"--seeds {text!r}: whole numbers with commas between, such as 0,1,2") from error
    if len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise ConfigurationError(f"--seeds {text!r}: each once, none negative")
    return seeds
