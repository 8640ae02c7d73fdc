"""Pictures of measurements, from their documents: matplotlib figures, drawn without a display.

Each function returns a Figure; `svg` and `save` turn one into text or a file, equal figures into equal bytes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure as _Figure

from hessdiag.errors import ConfigurationError, DataError
from hessdiag.store.files import BadFileError, path_text, write_bytes

TOTAL, OUTER, INNER, FAINT = "#1f4e79", "#2a9d8f", "#d1495b", "#8a8f98"
STYLE = {
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555b66",
    "axes.grid": True,
    "grid.color": "#e4e7ec",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "hessdiag",
    "figure.constrained_layout.use": True,
}
WIDE, NARROW = 7.2, 3.7
"""Inches: of a figure beside text, and of one on a phone."""
FORMATS = (".svg", ".png", ".pdf")
MOST_ROWS = 60


class Figure(_Figure):
    """matplotlib's, and shown by a notebook that has not imported pyplot."""

    def _repr_svg_(self) -> str:
        return svg(self)


def norms(rows: Mapping[str, Mapping[str, Any]], *, width: float = WIDE) -> Figure:
    """The rms norm of each parameter as a dot on its interval, on a logarithmic axis.

    No bars: on a logarithmic axis a bar starts where the axis happens to, and its length says nothing.
    """
    names = list(rows)[:MOST_ROWS]
    with rc_context(STYLE):
        figure = Figure(figsize=(width, 0.8 + 0.19 * len(names)))
        axis = figure.subplots()
        ends = [tuple(_number(rows[name]["total"][key]) for key in ("rms", "low", "high")) for name in names]
        least = min((x for row in ends for x in row if x > 0), default=1.0)
        for place, (rms, low, high) in enumerate(ends):
            if high > 0 and high > low:
                start = low if low > 0 else min(least, high * 1e-3)
                axis.plot([start, high], [place, place], color=TOTAL, linewidth=1.6, alpha=0.55)
            if rms > 0:
                axis.plot(rms, place, "o", color=TOTAL, markersize=4.2)
        axis.set_xscale("log")
        axis.set_yticks(range(len(names)), [_short(name, min(34, int(6.5 * width))) for name in names], fontsize=7.5)
        axis.set_ylim(len(names) - 0.4, -0.6)
        axis.set_xlabel("rms norm, with its interval")
        if len(rows) > len(names):
            axis.set_title(f"the first {len(names)} of {len(rows)} parameters", fontsize=9)
        return figure


def convergence(
    history: Sequence[Sequence[Any]], *, confidence: float, rtol: float | None, width: float = WIDE
) -> Figure:
    """The interval of the rms norm over replicates."""
    rows = [[_number(x) for x in row] for row in history]
    with rc_context(STYLE):
        figure = Figure(figsize=(width, 2.6))
        axis = figure.subplots()
        count, rms, low, high = ([row[k] for row in rows] for k in range(4))
        axis.fill_between(
            count, low, high, color=TOTAL, alpha=0.18, linewidth=0, label=f"{100 * confidence:g}% interval"
        )
        axis.plot(count, rms, color=TOTAL, marker="o", markersize=3, label="rms norm")
        if rtol is not None and rms and rms[-1] > 0:
            for sign in (1, -1):
                label = f"±{100 * rtol:g}%, as asked" if sign > 0 else None
                axis.axhline(rms[-1] * (1 + sign * rtol), color=FAINT, linestyle="--", linewidth=1, label=label)
        axis.set_xlabel("replicates")
        axis.set_ylabel("rms norm")
        axis.legend(fontsize=8, ncols=3 if width == WIDE else 1, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        return figure


def parts(rows: Mapping[str, Mapping[str, Any]], *, width: float = WIDE) -> Figure | None:
    """Gauss-Newton against functional norm of each parameter; None where the parts were not taken."""
    names: list[str] = []
    points: list[tuple[float, ...]] = []
    for name, row in rows.items():
        if row["gauss_newton"] is None or row["functional"] is None:
            continue
        ends = [_number(row[part][key]) for part in ("gauss_newton", "functional") for key in ("rms", "low", "high")]
        if ends[0] > 0 and ends[3] > 0:
            names.append(name)
            points.append(tuple(ends))
    if not points:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(width, 3.8))
        axis = figure.subplots()
        for g, g_low, g_high, f, f_low, f_high in points:
            across = [[max(g - g_low, 0)], [max(g_high - g, 0)]]
            along = [[max(f - f_low, 0)], [max(f_high - f, 0)]]
            axis.errorbar(g, f, xerr=across, yerr=along, fmt="o", markersize=4, color=OUTER, ecolor=FAINT, elinewidth=1)
        axis.set_xscale("log")
        axis.set_yscale("log", nonpositive="clip")
        for name, x, y in _apart([(name, p[0], p[3]) for name, p in zip(names, points)], 0.2 * WIDE / width):
            axis.annotate(_short(name, 24), (x, y), xytext=(4, 3), textcoords="offset points", fontsize=7)
        edge = [min(p[0] for p in points), max(p[0] for p in points)]
        axis.plot(edge, edge, color=FAINT, linestyle="--", linewidth=1, label="equal parts")
        axis.set_xlabel("Gauss-Newton part, rms")
        axis.set_ylabel("functional part, rms")
        axis.legend(fontsize=8)
        return figure


def over_curvature(points: Sequence[tuple[str, float, float, float, float]]) -> Figure:
    """(label, max|sigma''|, rms, low, high) of several measurements."""
    if not points:
        raise ConfigurationError("nothing to plot: no measurement has a finite max|sigma''| and a norm")
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.0))
        axis = figure.subplots()
        for label, x, rms, low, high in points:
            axis.errorbar(x, rms, yerr=[[max(rms - low, 0)], [max(high - rms, 0)]], fmt="o", color=TOTAL, capsize=3)
            axis.annotate(_short(label, 28), (x, rms), xytext=(5, 4), textcoords="offset points", fontsize=7.5)
        xs, ys = [p[1] for p in points], [p[2] for p in points]
        if max(xs) > 20 * max(min(xs), 1e-300):
            axis.set_xscale("log")
        if max(ys) > 20 * min(ys):
            axis.set_yscale("log")
        axis.margins(0.15)
        axis.set_xlabel("max|σ''| of the activation")
        axis.set_ylabel("rms norm of the Hessian's diagonal")
        return figure


def svg(figure: _Figure) -> str:
    """The figure as SVG text, without a date; letters as outlines, so that no font is needed."""
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "hessdiag", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def check_name(path: Path) -> None:
    """Refuse a suffix that names no format."""
    if path.suffix.lower() not in FORMATS:
        raise ConfigurationError(f"{path}: end the name in {', '.join(FORMATS)}")


def save(figure: _Figure, path: Path) -> None:
    """The figure in a file, whose suffix says how: .svg, .png or .pdf."""
    check_name(path)
    buffer = io.BytesIO()
    kind = path.suffix.lower()[1:]
    metadata: dict[str, Any] = {} if kind == "png" else {"Creator": None}
    metadata |= {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind, {})
    with rc_context({"svg.hashsalt": "hessdiag", "svg.fonttype": "path"}):
        figure.savefig(buffer, format=kind, dpi=160, metadata=metadata)
    try:
        write_bytes(path, buffer.getvalue())
    except BadFileError as error:
        raise DataError(f"{path_text(path)}: {error}") from None


def _apart(points: Sequence[tuple[str, float, float]], share: float) -> list[tuple[str, float, float]]:
    """Points far enough from one another (on logarithmic axes) for their names, a share of the width, to be read."""
    kept: list[tuple[str, float, float]] = []
    columns = [p[1] for p in points], [p[2] for p in points]
    spans = [max(math.log(max(column) / min(column)), 1e-9) for column in columns]
    for name, x, y in points:
        near = (abs(math.log(x / a)) < share * spans[0] and abs(math.log(y / b)) < 0.05 * spans[1] for _, a, b in kept)
        if not any(near):
            kept.append((name, x, y))
    return kept


def _number(value: Any) -> float:
    """A number of a document; NaN for what is none."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def _short(name: str, limit: int = 34) -> str:
    """A label that fits, with `$` harmless to matplotlib."""
    text = "".join(c if c.isprintable() else "?" for c in name).replace("$", r"\$")
    return text if len(text) <= limit else "…" + text[1 - limit :]
