"""`python -m validation`: the ledger; `--claim E28`: one claim; `--quick`: without what takes long."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from hessdiag.errors import HessdiagError
from hessdiag.store.files import write_bytes
from validation import ledger as ledgers
from validation.register import Run
from validation.report import show_claim, show_ledger, write_page
from validation.report.page import draw
from validation.studies import STUDIES


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m validation", description="Check every claim of the paper.")
    parser.add_argument("--quick", action="store_true", help="leave out what takes long; stored beside the full ledger")
    parser.add_argument(
        "--claim", action="append", default=[], metavar="ID", help="check one claim (E28, or 28) and show it"
    )
    parser.add_argument(
        "--study", action="append", default=[], metavar="NAME", help=f"run one study: {', '.join(STUDIES)}"
    )
    parser.add_argument("--out", type=Path, default=None, help="folder of the ledger (results/ledger, or .../quick)")
    parser.add_argument("--results", type=Path, default=Path("results"), help="results of experiments")
    parser.add_argument("--fresh", action="store_true", help="take nothing from the stored ledger")
    parser.add_argument("--no-studies", action="store_true", help="claims only")
    return parser


def main(given: list[str]) -> int:
    """0: all claims have evidence and all studies hold; 1: something failed; 2: the command made no sense."""
    options = arguments().parse_args(given)
    torch.set_num_threads(max(1, min(2, torch.get_num_threads())))
    run = Run(quick=options.quick, results=options.results)
    console = Console()
    try:
        if options.claim or options.study:
            return _some(options.claim, options.study, run, console)
        return _all(options, run, console)
    except HessdiagError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what was finished is stored, the same command goes on from there", file=sys.stderr)
        return 130


def _some(claims: list[str], studies: list[str], run: Run, console: Console) -> int:
    failed = False
    for name in ledgers.select(claims):
        record = ledgers.check_claim(name, run)
        show_claim(name, record, console)
        failed |= bool(record.get("error"))
    for name in studies:
        if name not in STUDIES:
            print(f"no study {name!r}; known: {', '.join(STUDIES)}", file=sys.stderr)
            return 2
        record = ledgers.run_study(name, run)
        console.print_json(data={k: record[k] for k in ("title", "columns", "rows", "findings", "notes")})
        failed |= bool(record.get("error")) or any(not f["holds"] for f in record["findings"])
    return int(failed)


def _all(options: argparse.Namespace, run: Run, console: Console) -> int:
    base = options.results / "ledger"
    out = options.out or (base / "quick" if run.quick else base)
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("claims")

        def progress(name: str, done: int, total: int, kept: bool) -> None:
            bar.update(task, completed=done, total=total, description=f"{name}{' (stored)' if kept else ''}"[:28])

        found = ledgers.build(
            run, out / "ledger.json", fresh=options.fresh, studies=not options.no_studies, progress=progress
        )
    show_ledger(found, console)
    write_page(found, out / "ledger.html")
    for name, record in found.studies.items():
        picture = draw(name, record)
        if picture is not None:
            write_bytes(out / f"{name}.svg", picture)
    console.print(f"{out / 'ledger.json'}, {out / 'ledger.html'}", highlight=False)
    for line in found.errors:
        console.print(f"[red]failed[/] {line}", highlight=False)
    return int(bool(found.errors))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
