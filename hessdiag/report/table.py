"""The tables of a measurement on a terminal, as wide as it is and no wider."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from hessdiag.report import facts
from hessdiag.report.text import digits, interval, percent, percent_interval, plain, spread, value

NARROW, WIDE = 76, 110
"""Below the first width tables leave columns out, from the second on they show all."""


class Terminal(Console):
    """A console that leaves a closed pipe to its caller, which knows the exit code."""

    def on_broken_pipe(self) -> None:
        """Instead of rich's own exit with 1."""
        raise BrokenPipeError


def terminal() -> Console:
    """Stdout: coloured and as wide as the terminal if it is one, plain otherwise; $COLUMNS decides if set."""
    return Terminal(highlight=False, soft_wrap=False, emoji=False, markup=False, file=sys.stdout)


def print_measurement(content: dict[str, Any], console: Console | None = None) -> None:
    """Everything a reader needs of one measurement."""
    out = console or terminal()
    out.print(Text(facts.title(content), style="bold"))
    out.print()
    _headline(out, content)
    _rows(out, [("status", facts.status(content))])
    if len(content["groups"]) > 1 or len(content["layers"]) > 1:
        invariant = content["invariant_groups"]
        _norms(out, "By group", "group", content["groups"], invariant)
        _norms(out, "By parameter", "parameter", content["layers"], None)
    _curvature(out, content["effective_curvature"])
    out.print(Text("Measured on", style="bold"))
    _rows(out, facts.model_rows(content) + facts.data_rows(content))
    out.print()
    _rows(out, facts.run_rows(content))
    for note in facts.notes(content):
        out.print(Padding(Text("note: " + note), (0, 0, 0, 2), expand=False))


def grid(rows: list[tuple[str, ...]], *, styles: tuple[str, ...] = ("dim",)) -> Table:
    """Columns without lines; the last one wraps."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style=styles[0])
    for _ in range(max(len(row) for row in rows) - 1):
        table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _rows(out: Console, rows: list[tuple[str, str]]) -> None:
    if rows:
        out.print(Padding(grid(list(rows)), (0, 0, 0, 2), expand=False))


def _headline(out: Console, content: dict[str, Any]) -> None:
    total, norm, trace = content["norm"]["total"], content["norm"], content["trace"]
    root = total["entries"] ** 0.5
    scaled = [x / root if isinstance(x, float) else x for x in (total["low"], total["high"])]
    sure = f"{100 * content['confidence']:g}%"
    lines = [
        (
            "rms norm",
            value(content["rms"], digits(*content["interval"])),
            interval(*content["interval"]),
            "sqrt(sum h^2 / p)",
        ),
        ("mean-scaled norm", value(content["mean_scaled"]), interval(*scaled), "sqrt(sum h^2) / p"),
        _share("Gauss-Newton", norm["share_gauss_newton"], "share of sum h^2"),
        _share("functional", norm["share_functional"], "share of sum h^2; rest: their cancellation"),
    ]
    invariant = content["invariant"]
    if invariant is not None:
        lines.append(
            (
                "invariant rms",
                value(invariant["rms"]),
                interval(invariant["low"], invariant["high"]),
                "of theta^2 h",
            )
        )
    lines.append(("trace", value(trace["value"]), interval(trace["low"], trace["high"]), "sum h"))
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, justify="right", style="bold")
    table.add_column(no_wrap=True)
    if out.width >= NARROW:
        table.add_column(overflow="fold", style="dim")
    for number, (label, amount, bounds, meaning) in enumerate(lines):
        ends = bounds[1:-1].split(", ")
        told = "" if len(ends) == 2 and ends[0] == ends[1] else bounds
        if number == 0:
            told = f"{told} at {sure}" if told else "exact"
        table.add_row(*[Text(x) for x in (label, amount, told, meaning)][: len(table.columns)])
    out.print(Padding(table, (0, 0, 0, 2), expand=False))
    out.print()


def _share(label: str, ratio: dict[str, Any] | None, meaning: str) -> tuple[str, str, str, str]:
    return label, percent(ratio), percent_interval(ratio), meaning


def _norms(
    out: Console, heading: str, label: str, rows: dict[str, Any], invariant: dict[str, Any] | None
) -> None:
    wide, narrow = out.width >= WIDE, out.width < NARROW
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="dim")
    table.add_column(label, overflow="fold", ratio=None, min_width=10)
    headers = [] if narrow else ["entries"]
    headers += ["rms", "interval" if wide else "±"]
    if wide:
        headers.append("mean-scaled")
    headers += ["functional"] if narrow else ["Gauss-Newton", "functional"]
    if invariant is not None:
        headers.append("invariant rms" if not narrow else "invariant")
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    for name, summary in rows.items():
        total = summary["total"]
        cells = [] if narrow else [f"{total['entries']:,}"]
        exact = total["status"] == "exact"
        bounds = interval(total["low"], total["high"], 3) if wide and not exact else spread(total)
        cells += [value(total["rms"]), bounds]
        if wide:
            cells.append(value(total["mean_scaled"]))
        shares = [percent(summary["share_gauss_newton"]), percent(summary["share_functional"])]
        cells += shares[1:] if narrow else shares
        if invariant is not None:
            cells.append(value(invariant[name]["rms"]) if name in invariant else "n/a")
        table.add_row(*(Text(cell) for cell in [plain(name), *cells]))
    out.print()
    out.print(Text(heading, style="bold"))
    out.print(Padding(table, (0, 0, 0, 2), expand=False))


def _curvature(out: Console, pairs: list[dict[str, Any]]) -> None:
    out.print()
    if not pairs:
        return
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="dim")
    table.add_column("normalisation", overflow="fold", min_width=10)
    table.add_column("activation", overflow="fold")
    for header in ("max|σ''|", "mean |γ|·max|σ''|", "largest"):
        table.add_column(header, justify="right", no_wrap=True)
    for pair in pairs:
        numbers = [value(pair[key]) for key in ("max_curvature", "mean", "largest")]
        table.add_row(*(Text(cell) for cell in [plain(pair["layer"]), plain(pair["activation"]), *numbers]))
    out.print(
        Text(
            "Effective curvature |γ|·max|σ''| of each normalisation and the activation it feeds", style="bold"
        )
    )
    out.print(Padding(table, (0, 0, 0, 2), expand=False))
    out.print()
