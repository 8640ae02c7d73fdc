"""What the analyses say, in a reader's words: first a line per sweep, then every peak and every test of a U."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator
from typing import Any

from experiments.correlation.report import WITHIN
from experiments.correlation.rows import NORMS
from experiments.correlation.verdicts import load_rules

Plain = dict[str, Any]


def table(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """Cells as HTML; everything in them is text, and what is short enough for a number stays on one line."""
    top = "".join(f"<th>{html.escape(cell)}" for cell in head)
    rows = "".join("<tr>" + "".join(map(_cell, row)) for row in lines)
    return f"<div class=scroll><table><tr>{top}{rows}</table></div>"


def _cell(text: str) -> str:
    number = len(text) <= 20 and any(digit in text for digit in "0123456789")
    return ("<td class=number>" if number else "<td>") + html.escape(text)


def summary(analyses: Plain) -> str:
    """One line per experiment: does the norm go with robustness, is it U-shaped, do the curves coincide."""
    if not analyses:
        return ""
    parts = ["<h2 id=findings>What these results say</h2>"]
    if not any(name.startswith("paper/") for name in analyses):
        parts.append(
            "<p>None of these runs has the paper's own setting (tier paper). What follows holds for the settings "
            "named; it neither confirms nor refutes what the paper shows on its own.</p>"
        )
    head = (
        "setting",
        "log-norm and robustness, among runs of one activation",
        "along max|σ''| (Spearman; no interval)",
        "U-shaped over max|σ''|",
        "robustness peaks at",
        "curves of all β below 15",
    )
    level = float(load_rules()["level"])
    lines = [
        [f"{sweep}: {name} ({size(report)})", *_line(name, report, level)]
        for sweep, name, report in experiments(analyses)
    ]
    parts.append(table(head, lines))
    parts.append(
        "<p class=soft>The paper's claim is a negative correlation and a U in every curve of the norm. Two smooth "
        "curves correlate by chance, so only runs of one activation, seeds' own luck taken away, have an interval. "
        f"U-shapes by the two-lines test at {level:.0%}, for the norm, its rescaling-invariant companion and the "
        "plug-in Hutchinson norm. Peaks by a quadratic in log and by a unimodal fit, each with its 95% interval.</p>"
    )
    return "\n".join(parts)


def experiments(analyses: Plain) -> Iterator[tuple[str, str, Plain]]:
    """Every analysed experiment of every sweep."""
    for sweep, found in analyses.items():
        for name, report in found.items():
            yield sweep, name, report


def size(report: Plain) -> str:
    """How much stands behind it."""
    seeds = report["seeds"]
    return f"{report['configurations']} configurations, {seeds} seed{'s' * (seeds > 1)}"


def reading(low: float, high: float) -> str:
    """What the interval of a correlation shows."""
    if high < 0:
        return "the flatter, the more robust"
    return "the sharper, the more robust" if low > 0 else "no sign shown"


def _line(name: str, report: Plain, level: float) -> list[str]:
    if name.startswith("standard,"):  # nothing is robust without adversarial training: its rank is noise
        return ["(standard training: not robust)", "-", _shapes(report, level), "-", "-"]
    return [
        _within(report),
        _along(report),
        _shapes(report, level),
        _peaks(report),
        _coincidence(report.get("coincidence")),
    ]


def _within(report: Plain) -> str:
    words = (
        f"{c['norm']} {c['value']:+.2f} [{c['low']:+.2f}, {c['high']:+.2f}]: {reading(c['low'], c['high'])}"
        for c in _chosen(report, "pearson", WITHIN)
    )
    return "; ".join(words) or "-"


def _along(report: Plain) -> str:
    return ", ".join(f"{c['norm']} {c['value']:+.2f}" for c in _chosen(report, "spearman", "nothing")) or "-"


def _chosen(report: Plain, kind: str, given: str) -> list[Plain]:
    wanted = (kind, "train/clean", given)
    return [c for c in report["correlations"] if (c["kind"], c["place"], c["given"]) == wanted]


def _shapes(report: Plain, level: float) -> str:
    words = []
    for norm in NORMS:
        curves = [c for c in report["curves"] if c["quantity"] == f"log {norm} train/clean" and "u_shape" in c]
        found = sum(c["u_shape"]["p_value"] < level for c in curves)
        words.append(f"{norm}: {found} of {len(curves)}")
    return ", ".join(words)


def _peaks(report: Plain) -> str:
    return "; ".join(
        f"β = {c['beta']}: " + ", ".join(_place(c["extreme"][fit]) for fit in c["extreme"])
        for c in report["curves"]
        if c["quantity"] == "aa2" and "extreme" in c
    )


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
