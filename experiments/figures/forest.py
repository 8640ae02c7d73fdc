"""Estimates with their intervals, one below the other on one axis: a forest plot as plain HTML, for any width.

A mark at x stands at 100 (s(x) - s(first)) / (s(last) - s(first)) per cent of its track, s(x) being x or log x.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """From `first` to `last`; ticks; a shaded band; what is to the left and to the right of it."""

    first: float
    last: float
    ticks: Sequence[float]
    log: bool = False
    band: tuple[float, float] | None = None
    ends: tuple[str, str] = ("", "")

    def place(self, x: float) -> float:
        """In per cent of the track, within it."""
        scale = math.log if self.log else float
        low, high = scale(self.first), scale(self.last)
        return min(max(100.0 * (scale(min(max(x, self.first), self.last)) - low) / (high - low), 0.0), 100.0)


@dataclass(frozen=True)
class Line:
    """One estimate: a dot on its interval, and the same as text; `beside` is a hollow mark without an interval."""

    name: str
    value: float | None
    low: float | None
    high: float | None
    text: str
    beside: float | None = None
    kind: str = ""


STYLE = """
.forest { margin: .6rem 0 1rem; font-size: .85rem; }
.forest h3 { font-size: .85rem; margin: .9rem 0 .15rem; font-weight: 600; }
.row { display: grid; grid-template-columns: 10rem 1fr 17rem; gap: 0 .8rem; align-items: center; min-height: 1.35rem; }
.row > span:last-child { color: var(--soft); font-variant-numeric: tabular-nums; }
.track { position: relative; height: 1.1rem; } .track > * { position: absolute; }
.tick { top: -.15rem; bottom: -.15rem; border-left: 1px solid var(--line); }
.shade { top: -.15rem; bottom: -.15rem; background: var(--shade); }
.bar { top: calc(50% - 1px); height: 2px; min-width: 2px; background: currentColor; }
.dot, .ring { top: calc(50% - .25rem); width: .5rem; height: .5rem; margin-left: -.25rem; border-radius: 50%; }
.dot { background: currentColor; } .ring { box-sizing: border-box; border: 1.5px solid var(--soft); }
.track.less { color: var(--less); } .track.more { color: var(--more); } .track { color: var(--soft); }
.axis .track { height: 1.2rem; font-size: .78rem; } .axis .track > * { transform: translateX(-50%); }
.axis .track > :first-child { transform: none; } .axis .track > :last-child { transform: translateX(-100%); }
.ends .track { display: flex; justify-content: space-between; height: auto; } .ends .track > * { position: static; }
@media (max-width: 640px) {
  .row { grid-template-columns: 1fr auto; margin-bottom: .3rem; }
  .row > .track { grid-row: 2; grid-column: 1 / 3; margin: 0 .3rem; }
  .axis > span, .ends > span { display: none; } }
"""


def forest(groups: Iterable[tuple[str, Sequence[Line]]], axis: Axis) -> str:
    """The lines of every group below its heading; nothing where there are none."""
    body = [
        f"<h3>{html.escape(heading)}</h3>" + "".join(_row(line, axis) for line in lines)
        for heading, lines in groups
        if lines
    ]
    if not body:
        return ""
    ticks = "".join(f"<span style='left:{axis.place(x):.2f}%'>{_tick(x)}</span>" for x in axis.ticks)
    ends = "".join(f"<span>{html.escape(end)}</span>" for end in axis.ends)
    head = _scale("ends", ends) if any(axis.ends) else ""
    return f"<div class=forest>{head}{''.join(body)}{_scale('axis', ticks)}</div>"


def _scale(kind: str, words: str) -> str:
    return f"<div class='row {kind}'><span></span><div class=track>{words}</div><span></span></div>"


def _row(line: Line, axis: Axis) -> str:
    marks = [f"<i class=tick style='left:{axis.place(x):.2f}%'></i>" for x in axis.ticks]
    if axis.band:
        marks.insert(0, f"<i class=shade style='{_span(*axis.band, axis)}'></i>")
    if line.low is not None and line.high is not None:
        marks.append(f"<i class=bar style='{_span(line.low, line.high, axis)}'></i>")
    if line.value is not None:
        marks.append(f"<i class=dot style='left:{axis.place(line.value):.2f}%'></i>")
    if line.beside is not None:
        marks.append(f"<i class=ring style='left:{axis.place(line.beside):.2f}%'></i>")
    kind = f" {line.kind}" if line.kind else ""
    return (
        f"<div class=row><span>{html.escape(line.name)}</span><div class='track{kind}'>{''.join(marks)}</div>"
        f"<span>{html.escape(line.text)}</span></div>"
    )


def _span(low: float, high: float, axis: Axis) -> str:
    left, right = axis.place(low), axis.place(high)
    return f"left:{left:.2f}%;width:{right - left:.2f}%"


def _tick(x: float) -> str:
    return f"{x:g}".replace("-", "−")
