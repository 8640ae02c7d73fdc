"""What the analyses say: first as forest plots, a line per estimate; then every peak and test of a U in tables."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator
from typing import Any

from experiments.correlation.report import WITHIN
from experiments.correlation.rows import NORMS
from experiments.correlation.verdicts import load_rules
from experiments.figures.curves import BAND
from experiments.figures.forest import Axis, Line, forest
from hessdiag.show.text import counted

Plain = dict[str, Any]
CORRELATION = Axis(-1.0, 1.0, (-1.0, -0.5, 0.0, 0.5, 1.0), ends=("the flatter, the more robust", "the sharper"))


def table(head: Iterable[str], lines: Iterable[Iterable[str]], *, markup: bool = False) -> str:
    """Cells as HTML: text (or `markup`), of which what is short enough for a number stays on one line."""
    top = "".join(f"<th>{html.escape(cell)}" for cell in head)
    cell = "<td>{}".format if markup else _cell
    rows = "".join("<tr>" + "".join(map(cell, row)) for row in lines)
    return f"<div class=scroll><table><tr>{top}{rows}</table></div>"


def _cell(text: str) -> str:
    number = len(text) <= 20 and any(digit in text for digit in "0123456789")
    return ("<td class=number>" if number else "<td>") + html.escape(text)


def summary(analyses: Plain) -> str:
    """Does the norm go with robustness, where is robustness highest, is the norm U-shaped, do the curves coincide."""
    if not analyses:
        return ""
    parts = ["<h2 id=findings>What these results say</h2>"]
    if not any(name.startswith("paper/") for name in analyses):
        parts.append(
            "<p>None of these runs has the paper's own setting (tier paper). What follows holds for the settings "
            "named; it neither confirms nor refutes what the paper shows on its own.</p>"
        )
    told = {(sweep, name): f"{sweep}: {name} ({size(report)})" for sweep, name, report in experiments(analyses)}
    robust = [  # nothing is robust without adversarial training: its rank is noise
        (told[sweep, name], report) for sweep, name, report in experiments(analyses) if not name.startswith("standard,")
    ]
    if drawn := forest([(setting, _along(report)) for setting, report in robust], CORRELATION):
        parts.append(
            "<p><b>Does a lower norm go with more robustness?</b> Correlation of log-norm and robust accuracy among "
            "runs of one activation, seeds' own luck taken away, with its 95% interval (dot); and Spearman's along "
            "max|σ''|, which smooth curves have by chance (ring, no interval). The paper's claim is a negative one.</p>"
            + drawn
        )
    if drawn := forest([(setting, _peaks(report)) for setting, report in robust], _curvature_axis(robust)):
        parts.append(
            "<p><b>At which max|σ''| is robustness highest?</b> By a quadratic in log and by a unimodal fit, each with "
            "its 95% interval. The paper's range is grey.</p>" + drawn
        )
    level = float(load_rules()["level"])
    lines = [
        [told[sweep, name], *_shapes(report, level), _coincidence(report.get("coincidence"))]
        for sweep, name, report in experiments(analyses)
    ]
    head = ("setting", *(f"{norm}: U in" for norm in NORMS), "curves of all β below 15")
    parts.append(
        "<p><b>Is the norm U-shaped over max|σ''|, and do the curves of all β coincide?</b> U-shapes by the two-lines "
        f"test at {level:.0%}, for the norm, its rescaling-invariant companion and the plug-in Hutchinson norm.</p>"
        + table(head, lines)
    )
    return "\n".join(parts)


def _curvature_axis(robust: list[tuple[str, Plain]]) -> Axis:
    """As wide as the activations that were trained."""
    ends = [x for _, report in robust for line in _peaks(report) for x in (line.low, line.high) if x is not None]
    first, last = min([1.0, *ends]), max([30.0, *ends])
    ticks = [first, *(tick for tick in (2.0, 4.0, 10.0, 30.0) if 1.05 * first < tick < 0.95 * last), last]
    return Axis(first, last, ticks, log=True, band=BAND)


def experiments(analyses: Plain) -> Iterator[tuple[str, str, Plain]]:
    """Every analysed experiment of every sweep."""
    for sweep, found in analyses.items():
        for name, report in found.items():
            yield sweep, name, report


def size(report: Plain) -> str:
    """How much stands behind it."""
    seeds, dead = report["seeds"], report["unlearned"]
    told = f"{report['configurations']} configurations, {seeds} seed{'s' * (seeds > 1)}"
    return told + (f", without {counted(dead, 'run')} that did not learn" if dead else "")


def _along(report: Plain) -> list[Line]:
    """A line per norm."""
    ranks = {c["norm"]: float(c["value"]) for c in _chosen(report, "spearman", "nothing")}
    lines = []
    for c in _chosen(report, "pearson", WITHIN):
        value, low, high = float(c["value"]), float(c["low"]), float(c["high"])
        rank = ranks.pop(c["norm"], None)
        told = "" if rank is None else f"; along {rank:+.2f}"
        kind = "less" if high < 0 else "more" if low > 0 else ""
        lines.append(Line(c["norm"], value, low, high, f"{value:+.2f} [{low:+.2f}, {high:+.2f}]{told}", rank, kind))
    return lines + [Line(norm, None, None, None, f"along {x:+.2f}", x) for norm, x in ranks.items()]


def _chosen(report: Plain, kind: str, given: str) -> list[Plain]:
    wanted = (kind, "train/clean", given)
    return [c for c in report["correlations"] if (c["kind"], c["place"], c["given"]) == wanted]


def _shapes(report: Plain, level: float) -> list[str]:
    """How many of the curves of each norm are a U."""
    words = []
    for norm in NORMS:
        curves = [c for c in report["curves"] if c["quantity"] == f"log {norm} train/clean" and "u_shape" in c]
        found = sum(c["u_shape"]["p_value"] < level for c in curves)
        words.append(f"{found} of {len(curves)}")
    return words


def _peaks(report: Plain) -> list[Line]:
    """A line per β and fit."""
    return [
        Line(f"β = {c['beta']}, {fit}", peak["at"], peak["low"], peak["high"], _place(peak))
        for c in report["curves"]
        if c["quantity"] == "aa2" and "extreme" in c
        for fit, peak in c["extreme"].items()
    ]


def _place(peak: Plain) -> str:
    return f"{peak['at']:.2g} [{peak['low']:.2g}, {peak['high']:.2g}]" + (" (at the end)" if peak["edge"] else "")


def _coincidence(found: Plain | None) -> str:
    if found is None or "refused" in found:
        return "-" if found is None else str(found["refused"])
    apart = f"fits at most {100 * found['distance']:.2g} points apart, below {100 * found['upper']:.2g} at 95%"
    return f"{found['verdict']} ({apart}; margin {100 * found['margin']:.2g})"


def curves(analyses: Plain) -> str:
    """Every curve's extreme by both fits and both tests of its shape."""
    parts = [
        "<h2 id=shapes>Peaks and U-shapes</h2><p class=soft>Robust and clean accuracy: where highest, and whether the "
        "curve is an inverted U; norms: where lowest, and whether it is a U. 95% intervals over seed noise; p-values "
        "of “no U”. The two-lines test decides.</p>"
    ]
    head = ("curve", "quantity", "quadratic in log", "unimodal", "p, two lines", "p, quadratic")
    for sweep, name, report in experiments(analyses):
        lines = []
        for c in report["curves"]:
            which = "all" if c["beta"] is None else f"β = {c['beta']}"
            if "refused" in c:
                lines.append([which, c["quantity"], str(c["refused"]), "-", "-", "-"])
                continue
            shape, places = c["u_shape"], [_place(c["extreme"][fit]) for fit in ("quadratic", "unimodal")]
            ps = [f"{shape[p]:.2g}" for p in ("p_value", "quadratic_p_value")]
            lines.append([which, c["quantity"], *places, *ps])
        summary = html.escape(f"{sweep}: {name} ({size(report)})")
        parts.append(f"<details><summary>{summary}</summary>{table(head, lines)}</details>")
    return "\n".join(parts)
