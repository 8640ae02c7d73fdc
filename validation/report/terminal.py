"""The ledger as a table, and one claim in full."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from validation.ledger import Ledger

COLOURS = {
    "proved": "green",
    "verified exactly": "green",
    "as defined": "green",
    "consistent in print": "green",
    "holds numerically": "green",
    "holds under conditions": "yellow",
    "refuted": "red",
    "contradicted by measurement": "red",
    "not tested": "dim",
    "holds": "green",
    "contradicts": "red",
    "transfers": "green",
    "does not transfer": "red",
    "no difference beyond δ": "red",
    "depends on the setting": "yellow",
    "inconclusive": "dim",
}


def _short(record: dict[str, Any], width: int = 110) -> str:
    text = str(record["correction"] or record["counterexample"] or record["summary"])
    return text if len(text) <= width else text[: width - 1] + "…"


def show_ledger(ledger: Ledger, console: Console) -> None:
    """Every claim in one line, then the studies and the counts."""
    table = Table(show_lines=False, header_style="bold", expand=False)
    for column in ("claim", "where", "verdict", "what was found"):
        table.add_column(column, overflow="fold", no_wrap=column == "claim")
    for name, record in ledger.claims.items():
        colour = COLOURS[record["verdict"]]
        table.add_row(
            escape(name), escape(record["where"]), f"[{colour}]{record['verdict']}[/]", escape(_short(record))
        )
    console.print(table)
    for name, record in ledger.studies.items():
        whole = f"{len(record['findings'])} findings hold"
        failed = [f for f in record["findings"] if not f["holds"]]
        state = record.get("error") or (f"{len(failed)} of {len(record['findings'])} findings FAIL" if failed else "")
        console.print(f"study {name}: {escape(record['title'])}; {state or whole}")
    console.print(", ".join(f"{count} {verdict}" for verdict, count in ledger.counts().items()), highlight=False)


def show_claim(name: str, record: dict[str, Any], console: Console) -> None:
    """Statement, formula, verdict and evidence of one claim."""
    colour = COLOURS[record["verdict"]]
    console.print(f"[bold]{escape(name)}[/]  {escape(record['where'])}  ({record['kind']})", highlight=False)
    console.print(f"  {escape(record['statement'])}", highlight=False)
    if record["formula"]:
        console.print(f"  {escape(record['formula'])}", highlight=False, soft_wrap=True)
    reach = f" {escape(record['reach'])}" if record.get("reach") else ""
    console.print(f"verdict: [{colour}]{record['verdict']}[/]{reach}", highlight=False)
    for surprise in record.get("surprises", []):
        console.print(f"[red]not foreseen by the check[/]: {escape(surprise)}", highlight=False, soft_wrap=True)
    if record.get("error"):
        console.print(f"error: {escape(record['error'])}")
    for finding in record["findings"]:
        mark = "holds" if finding["holds"] else "FAILS"
        kind = "exact" if finding["exact"] else "measured"
        scope = f" [{finding['condition']}]" if finding["condition"] else ""
        line = f"  {mark} ({kind}){scope} {finding['statement']}"
        if finding["figure"] is not None:
            line += "  " + _number(finding["figure"])
        console.print(escape(line), highlight=False, soft_wrap=True)
        if finding["detail"]:
            console.print(f"      {escape(finding['detail'])}", highlight=False, soft_wrap=True)
    for label in ("counterexample", "correction", "note"):
        if record[label]:
            console.print(f"{label}: {escape(record[label])}", highlight=False, soft_wrap=True)
    for row, words in (record.get("settings") or {}).items():
        for setting, word in words.items():
            console.print(escape(f"  {row}  {setting}: {word}"), highlight=False)
    if not record["findings"]:
        console.print(escape(record["summary"]), highlight=False)
    console.print(f"check: {record['check']}", highlight=False)


def _number(figure: dict[str, Any]) -> str:
    low, high = figure["low"], figure["high"]
    text = f"{figure['label']} {_value(figure['value'])}"
    if low is None and high is None:
        return text
    return f"{text} [{_value(low)}, {_value(high)}] ({figure['interval']})"


def _value(value: float | str | None) -> str:
    return "-" if value is None else value if isinstance(value, str) else f"{value:.6g}"
