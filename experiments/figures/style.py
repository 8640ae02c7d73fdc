"""One look for every figure: readable in grey, by the colour-blind, on paper and on a screen."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import ceil, floor, log10
from pathlib import Path
from textwrap import wrap
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, Locator, MaxNLocator, NullFormatter, NullLocator

from hessdiag.store.files import replace_file

# Okabe and Ito's palette, ordered from dark to light so that grey prints differ; markers and lines differ
# as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1)), (0, (1, 1)))
BAND = "#BBBBBB"
PAPER = "#000000"

SETTINGS: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 5,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.fonttype": "none",
    "svg.hashsalt": "figures",
    "figure.constrained_layout.use": True,
    "savefig.dpi": 150,
}


def looks(index: int) -> dict[str, Any]:
    """Colour, marker and line of the curve with this number."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINES[index % len(LINES)],
        "markerfacecolor": "white" if index % 2 else COLOURS[index % len(COLOURS)],
    }


@contextmanager
def canvas(path: Path, rows: int = 1, columns: int = 1, *, width: float = 3.6, height: float = 2.9) -> Iterator[Any]:
    """Axes to draw on; both `path`.png and `path`.svg are written at the end."""
    with plt.rc_context(SETTINGS):
        figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
        try:
            yield axes
            path.parent.mkdir(parents=True, exist_ok=True)
            kinds: tuple[tuple[str, dict[str, Any]], ...] = ((".png", {}), (".svg", {"metadata": {"Date": None}}))
            for suffix, about in kinds:
                picture = io.BytesIO()
                figure.savefig(picture, format=suffix[1:], **about)
                replace_file(path.with_suffix(suffix), picture.getvalue())
        finally:
            plt.close(figure)


def label(axis: Any, text: str) -> None:
    """What is shown and from which tier it comes, under the plot."""
    width = int(18 * axis.figure.get_figwidth())  # characters of 7 points that fit
    axis.figure.supxlabel("\n".join(wrap(text, width)), fontsize=7, color="#444444")


def legend_above(axis: Any) -> None:
    """The legend in one row above everything drawn on a linear axis: bars would pass behind it elsewhere."""
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + 0.16 * (high - low))
    handles, _ = axis.get_legend_handles_labels()
    axis.legend(loc="upper center", ncols=len(handles), columnspacing=1.0, handletextpad=0.4)


def band(axis: Any, low: float, high: float) -> None:
    """The paper's optimal range, shaded."""
    axis.axvspan(low, high, color=BAND, alpha=0.35, linewidth=0, zorder=0)


class PlainTicks(Locator):
    """Ticks of a logarithmic axis at round numbers: the coarsest set of which at least three are in sight."""

    STEPS = ((1.0,), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0))

    def __call__(self) -> list[float]:
        """For the axis as it stands."""
        low, high = sorted(self.axis.get_view_interval())  # type: ignore[union-attr]
        return self.tick_values(low, high)

    def tick_values(self, vmin: float, vmax: float) -> list[float]:
        """Between three and about eight of them."""
        if not 0 < vmin < vmax:
            return []
        decades = range(floor(log10(vmin)), ceil(log10(vmax)) + 1)
        for steps in self.STEPS:
            ticks = [step * 10.0**decade for decade in decades for step in steps]
            ticks = [tick for tick in ticks if vmin <= tick <= vmax]
            if len(ticks) >= 3:
                return ticks[:: ceil(len(ticks) / 8)]
        return [float(tick) for tick in MaxNLocator(4).tick_values(vmin, vmax) if vmin <= tick <= vmax]


def log_values(axis: Any, *, horizontal: bool) -> None:
    """A logarithmic axis labelled in plain numbers, each exact."""
    side = axis.xaxis if horizontal else axis.yaxis
    (axis.set_xscale if horizontal else axis.set_yscale)("log")
    side.set_major_locator(PlainTicks())
    side.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.6g}"))
    side.set_minor_locator(NullLocator())


def log_curvature(axis: Any, values: Sequence[float]) -> None:
    """A logarithmic axis of max|σ''| with ticks where runs are, thinned until they can be read."""
    axis.set_xscale("log")
    axis.set_xlabel("max|σ''|")
    ticks: list[float] = []
    for value in sorted(set(values)):
        if not ticks or value / ticks[-1] > 1.28:
            ticks.append(value)
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.xaxis.set_minor_locator(FixedLocator([]))
