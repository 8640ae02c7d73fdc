"""The table of `hessdiag measure --dry-run`."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from hessdiag.methods import Forecast
from hessdiag.show.columns import Column, print_table
from hessdiag.show.text import bytes_, plain, seconds, value


def print_costs(out: Console, found: tuple[Forecast, ...], *, title: str, replicates: int) -> None:
    """One row per method; what cannot serve says why below."""
    out.print(Text(title, style="bold"))
    out.print(Text("Nothing was measured: only the first batch went forward, to be timed and counted."))
    out.print()
    columns = [Column("method", text=True)]
    columns += [Column("passes"), Column("+ each", 1), Column("memory", 2), Column("time")]
    columns.append(Column(f"at {replicates}", 3))
    rows = []
    for one in found:
        if one.refusal is not None:
            rows.append([f"{one.method}: does not serve", "", "", "", "", ""])
            continue
        random = one.passes_each > 0
        once = one.passes_once * one.batches
        each = f"{one.passes_each * one.batches:,}" if random else "-"
        cells = [one.method, f"{once:,}", each, bytes_(one.bytes)]
        cells += [seconds(one.seconds_once), seconds(one.seconds(replicates)) if random else "-"]
        rows.append(cells)
    print_table(out, columns, rows)
    out.print()
    for one in found:
        if one.refusal is not None:
            out.print(Padding(Text(f"{one.method}: {plain(one.refusal)}"), (0, 0, 0, 2), expand=False))
        elif one.multiplications is not None:
            out.print(
                Padding(
                    Text(f"{one.method}: {value(one.multiplications, 2)} multiplications"),
                    (0, 0, 0, 2),
                    expand=False,
                )
            )
    for line in (
        "passes: over one batch each, all batches counted; of exact: directions moved forward, often through a "
        "part of the network only; of reference: products with the Hessian.",
        f"+ each: more passes per replicate; at {replicates}: the time with so many. How many an interval needs is "
        "not known before: at least ten; propagation seldom more than thirty, hutchinson often hundreds.",
        "time and memory: from counts and the timed pass, good to a factor of two or three.",
    ):
        out.print(Padding(Text(line, style="dim"), (0, 0, 0, 2), expand=False))
