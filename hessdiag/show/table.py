"""The tables of a measurement on a terminal, as wide as it is and no wider."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from hessdiag.show import sentences as facts
from hessdiag.show.columns import Column, print_pairs, print_table
from hessdiag.show.text import (
    ABOVE,
    digits,
    interval,
    is_above,
    percent,
    percent_interval,
    plain,
    spread,
    value,
)


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
    print_pairs(out, [("status", facts.status(content)), *facts.accuracy_rows(content)])
    if len(content["groups"]) > 1 or len(content["layers"]) > 1:
        invariant = content["invariant_groups"]
        _norms(out, "By group", "group", content["groups"], invariant)
        _norms(out, "By parameter", "parameter", content["layers"], None)
    _curvature(out, content["effective_curvature"])
    out.print(Text("Measured on", style="bold"))
    print_pairs(out, facts.model_rows(content) + facts.data_rows(content))
    out.print()
    print_pairs(out, facts.run_rows(content))
    for note in facts.notes(content):
        out.print(Padding(Text("note: " + note), (0, 0, 0, 2), expand=False))


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
        _share("Gauss-Newton", norm["share_gauss_newton"], ""),
        _share("functional", norm["share_functional"], "; rest: their cancellation"),
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
    rows = []
    for number, (label, amount, bounds, meaning) in enumerate(lines):
        ends = bounds[1:-1].split(", ")
        told = "" if len(ends) == 2 and ends[0] == ends[1] else bounds
        if number == 0:
            told = f"{told} at {sure}" if told else facts.exact_for(content)
        rows.append((label, amount, told, meaning))
        if number == 0:
            rows += facts.spread_lines(content)
    columns = (Column("", text=True), Column(""), Column("", left=True), Column("", 1, text=True))
    print_table(out, columns, rows)
    out.print()


def _share(label: str, ratio: dict[str, Any] | None, more: str) -> tuple[str, str, str, str]:
    meaning = f"share of sum h^2{more}"
    if is_above(ratio):
        meaning = "relative size, of sum h^2: the parts cancel"
    return label, percent(ratio), percent_interval(ratio), meaning


def _norms(out: Console, heading: str, label: str, rows: dict[str, Any], invariant: dict[str, Any] | None) -> None:
    columns = [
        Column(label, text=True),
        Column("entries", 4),
        Column("rms"),
        Column("±"),
        Column("interval", 6),
        Column("mean-scaled", 5),
        Column("Gauss-Newton", 3),
        Column("functional", 1),
    ]
    if invariant is not None:
        columns.append(Column("invariant rms", 2))
    lines: list[list[str]] = []
    above: set[str] = set()
    for name, summary in rows.items():
        total = summary["total"]
        exact = total["status"] == "exact"
        shares = [summary["share_gauss_newton"], summary["share_functional"]]
        above |= {head for head, share in zip(("Gauss-Newton", "functional"), shares) if is_above(share)}
        cells = [
            plain(name),
            f"{total['entries']:,}",
            value(total["rms"]),
            spread(total),
            "" if exact else interval(total["low"], total["high"], 3),
            value(total["mean_scaled"]),
            *map(percent, shares),
        ]
        if invariant is not None:
            cells.append(value(invariant[name]["rms"]) if name in invariant else "n/a")
        lines.append(cells)
    if not any(cells[4] for cells in lines):  # all exact: no interval to show
        columns.pop(4)
        for cells in lines:
            cells.pop(4)
    out.print()
    out.print(Text(heading, style="bold"))
    if above & print_table(out, columns, lines):
        out.print(Padding(Text(ABOVE, style="dim"), (0, 0, 0, 2), expand=False))


def _curvature(out: Console, pairs: list[dict[str, Any]]) -> None:
    out.print()
    if not pairs:
        return
    columns = (
        Column("normalisation", text=True),
        Column("activation", 1, text=True),
        Column("max|σ''|", 2),
        Column("largest", 3),
        Column("mean |γ|·max|σ''|"),
    )
    rows = [
        [
            plain(pair["layer"]),
            plain(pair["activation"]),
            *(value(pair[key]) for key in ("max_curvature", "largest", "mean")),
        ]
        for pair in pairs
    ]
    out.print(Text("Effective curvature |γ|·max|σ''| of each normalisation and the activation it feeds", style="bold"))
    print_table(out, columns, rows)
    out.print()
