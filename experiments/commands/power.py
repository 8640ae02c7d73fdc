"""`python -m experiments power SWEEP`: what a sweep could decide, before it runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from experiments.commands.common import Seeds
from hessdiag.show.text import counted

QUANTITIES = ("aa2", "clean")


def command(
    file: Annotated[Path, typer.Argument(help="A sweep file, such as experiments/sweeps/smoke/figure3.toml.")],
    results: Annotated[Path, typer.Option(help="Exported results, whose scatter is used.")] = Path("results"),
    seeds: Seeds = None,
    stage: Annotated[int | None, typer.Option(help="The last stage to count, where a file has several.")] = None,
) -> int:
    """Half-width of each contrast, power for the effect that rules.toml names, the seeds that 90% need, and the chance
    to show that what is no difference is smaller than δ.

    The scatter of a run comes from the nearest stored setting, which is named with all in which it differs: where it
    differs in data, method or network, take the figures as rough.
    """
    from experiments.commands.sweep import _seeds
    from experiments.correlation.forecast import forecast
    from experiments.correlation.judges import unit
    from experiments.correlation.verdicts import load_rules, shared_rules
    from experiments.sweep import grid
    from experiments.sweep.export import read_all

    sweep = grid.load(file, seeds=_seeds(seeds), stage=stage)
    table = load_rules()
    rules = shared_rules(table)
    quantities = [*QUANTITIES, *(norm["quantity"] for norm in table["norms"].values())]
    found, sources = forecast(sweep, read_all(results), rules, quantities)
    console = Console(soft_wrap=True)
    number = len({run.train["seed"] for run in sweep.runs})
    size = f"{counted(len(sweep.runs), 'run')}, {counted(number, 'seed')}"
    console.print(f"{sweep.name}: {sweep.title}; {size}", highlight=False, markup=False)
    for name, scatter in sources.items():
        rough = f"; differs: {', '.join(scatter.differs)}" if scatter.differs else ""
        text = f"scatter of {name}: {unit(scatter.value, name)} a run, {scatter.freedom} d.f., from {scatter.source}"
        console.print(text + rough, highlight=False, markup=False)
    head = ("curve", "contrast", "quantity", "half-width", "effect", "power", "seeds for 90%", "shows equality")
    shown = Table(*head, header_style="bold")
    for row in found:
        half = "one seed tells none" if math.isinf(row.half) else f"± {unit(row.half, row.quantity)}"
        needed = str(row.seeds) if row.seeds else "> 200"
        effect = unit(row.effect, row.quantity)
        chances = f"{row.power:.0%}", needed, f"{row.equal:.0%}"
        shown.add_row(row.curve or "all", row.contrast, row.quantity, half, effect, *chances)
    console.print(shown)
    console.print(
        "power and equality: of one contrast, before Holm's correction. A claim needs several contrasts (equality"
    )
    console.print("each level of low and high, too), and is one of its family: it is seen less often.")
    return 0
