"""`python -m experiments verdicts`: the matrix of claims and settings, from the stored results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Column, Table

from experiments.commands.common import Results
from hessdiag.errors import UnknownNameError, nearest

COLOURS = {
    "holds": "green",
    "transfers": "green",
    "contradicts": "red",
    "does not transfer": "red",
    "no difference beyond δ": "red",
    "depends on the setting": "yellow",
    "inconclusive": "dim",
    "not tested": "dim",
}


def coloured(word: str, mark: str = "") -> str:
    """A verdict's word with its mark, as rich writes it."""
    return f"[{COLOURS[word]}]{word}{mark}[/]"


def command(
    results: Results = Path("results"),
    claim: Annotated[str | None, typer.Option(help="One claim in full, such as F7a.u-shape.")] = None,
    tables: Annotated[bool, typer.Option(help="Also every cell of Tables 1 and 2.")] = False,
) -> int:
    """Judge every claim in every setting by experiments/correlation/rules.toml. Nothing is written.

    Example: python -m experiments verdicts --claim S4.5.same-range
    """
    from experiments.correlation.verdicts import EXPLORATORY, NOT_TESTED, Cell, sentence, verdicts
    from experiments.sweep.export import read_all

    found = verdicts(read_all(results))
    console = Console(soft_wrap=claim is not None)
    if claim is not None:
        rows = {name: verdict for name, verdict in found.items() if name == claim or verdict.claim == claim}
        if not rows:
            raise UnknownNameError(f"no claim {claim!r} has a rule; {nearest(claim, list(found))}")
        for name, verdict in rows.items():
            console.print(f"[bold]{escape(name)}[/]: {verdict.verdict}. {escape(verdict.statement)}", highlight=False)
            for cell in verdict.cells:
                console.print(f"  {escape(sentence(cell))}; {cell.status}", highlight=False)
                for curve, word in cell.curves.items():
                    console.print(f"    {escape(curve)} alone: {word}", highlight=False)
            if not verdict.cells:
                console.print(f"  {escape(verdict.evidence)}", highlight=False)
        return 0
    shown = {name: v for name, v in found.items() if tables or name[:3] not in ("T1.", "T2.")}
    settings = list(dict.fromkeys(c.setting for v in shown.values() for c in v.cells if c.word != NOT_TESTED))

    def star(cell: Cell) -> str:
        return "*" if cell.status == EXPLORATORY else ""

    table = Table(*(Column(name, no_wrap=True) for name in ("claim", "verdict", *settings)), header_style="bold")
    for name, verdict in shown.items():
        words = {c.setting: coloured(c.word, star(c)) for c in verdict.cells if c.word != NOT_TESTED}
        table.add_row(escape(name), coloured(verdict.verdict), *(words.get(place, "") for place in settings))
    if console.measure(table, options=console.options.update(width=10_000)).maximum <= console.width:
        console.print(table)
    else:  # whole words in a narrow terminal: for each claim its settings by what they say
        for name, verdict in shown.items():
            console.print(f"[bold]{escape(name)}[/]: {coloured(verdict.verdict)}", highlight=False)
            said: dict[str, list[str]] = {}
            for told in verdict.cells:
                if told.word != NOT_TESTED:
                    said.setdefault(told.word, []).append(told.setting + star(told))
            for word, places in said.items():
                console.print(Padding(f"{coloured(word)}: {escape(', '.join(places))}", (0, 0, 0, 4)), highlight=False)
    console.print("* exploratory: the results were there before the rule. Where nothing stands, nothing was run.")
    console.print("--claim NAME tells why.")
    return 0
