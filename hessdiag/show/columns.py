"""Tables that fit a terminal: columns fall away whole, names fold, and no number is ever cut.

A number that loses its last digits is another number (5.132e-05 at one column less reads 5.132e-). Every column of
numbers is therefore as wide as its widest cell or not shown at all, and where not even the ones that must stay fit,
each row becomes a few lines of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

GAP = 2
"""Spaces between two columns."""
NAME = 14
"""Names fold down to this width before columns fall away."""
EXTRA = 5
"""Columns of this rank and above fall away before a name folds."""


@dataclass(frozen=True)
class Column:
    """A head, when the column falls away (the highest rank first, 0 never), whether it holds words, and its side."""

    head: str
    rank: int = 0
    text: bool = False
    left: bool = False


def print_table(out: Console, columns: Sequence[Column], rows: Sequence[Sequence[str]], *, indent: int = 2) -> set[str]:
    """The rows under their heads, with the columns that fit; returns the heads shown."""
    if not rows:
        return set()
    room = max(out.width - indent, 1)
    widths = [max(map(cell_len, cells)) for cells in zip([c.head for c in columns], *rows)]
    kept = list(range(len(columns)))
    while True:
        least = [min(widths[k], NAME) if columns[k].text else widths[k] for k in kept]
        whole = sum(widths[k] for k in kept) + GAP * (len(kept) - 1)
        tight = sum(least) + GAP * (len(kept) - 1)
        worst = max(kept, key=lambda k: columns[k].rank)
        rank = columns[worst].rank
        if rank and (tight > room or (whole > room and rank >= EXTRA)):
            kept.remove(worst)
            continue
        break
    heads = {columns[k].head for k in kept}
    if tight > room:
        _print_apart(out, columns, kept, rows, indent)
        return heads
    spare = room - tight
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="dim", show_header=any(heads))
    shown: dict[int, int] = {}
    for k, narrow in zip(kept, least):
        grown = min(widths[k] - narrow, spare)
        spare -= grown
        shown[k] = narrow + grown
        side: Literal["left", "right"] = "left" if columns[k].text or columns[k].left else "right"
        table.add_column(columns[k].head, justify=side, width=shown[k], no_wrap=not columns[k].text, overflow="fold")
    for row in rows:
        table.add_row(*(Text(fold(row[k], shown[k]) if columns[k].text else row[k]) for k in kept))
    out.print(Padding(table, (0, 0, 0, indent), expand=False))
    return heads


def print_pairs(out: Console, rows: Sequence[tuple[str, str]], *, indent: int = 2) -> None:
    """Labels and what they stand for; below one another where the labels would take half the room."""
    if not rows:
        return
    room = max(out.width - indent, 1)
    label = max(cell_len(name) for name, _ in rows)
    if label > room // 2:
        for name, told in rows:
            out.print(Padding(Text(fold(name, room), style="dim"), (0, 0, 0, indent), expand=False))
            out.print(Padding(Text(told), (0, 0, 0, min(indent + 2, room - 1)), expand=False))
        return
    table = Table.grid(padding=(0, GAP))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for name, told in rows:
        table.add_row(Text(name), Text(told))
    out.print(Padding(table, (0, 0, 0, indent), expand=False))


def fold(name: str, width: int) -> str:
    """`name` on lines of `width`, broken after a dot, a comma or an underscore where there is one."""
    lines, rest = [], name
    while cell_len(rest) > width:
        cut = max(rest.rfind(mark, 0, width) + 1 for mark in ".,_:/ ")
        cut = cut if cut > width // 3 else width
        lines.append(rest[:cut].rstrip())
        rest = rest[cut:].lstrip(" ")
    return "\n".join([*lines, rest])


def _print_apart(
    out: Console, columns: Sequence[Column], kept: Sequence[int], rows: Sequence[Sequence[str]], indent: int
) -> None:
    """Every row as a name and below it its numbers, each with its head."""
    for row in rows:
        first, *others = kept
        out.print(Padding(Text(fold(row[first], out.width - indent)), (0, 0, 0, indent), expand=False))
        for k in others:
            if row[k]:
                line = Text(f"{columns[k].head} " if columns[k].head else "", style="dim")
                line.append(row[k], style="not dim")
                out.print(Padding(line, (0, 0, 0, indent + 2), expand=False))
