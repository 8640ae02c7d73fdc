"""A measurement where it was made: six lines for a prompt, a fragment for a notebook, rows for a table of data."""

from __future__ import annotations

import math
from html import escape
from typing import Any

from hessdiag.measuring.result import Measurement, NormSummary
from hessdiag.show import sentences as facts
from hessdiag.show.html import badge, norms_table, tiles
from hessdiag.show.text import counted, digits, interval, loss, percent, plain, value

STYLE = """<style>
.hessdiag{font:13px/1.45 system-ui,sans-serif}.hessdiag .tiles{display:flex;flex-wrap:wrap;gap:8px;margin:6px 0}
.hessdiag .tiles div{border:1px solid #8885;border-radius:6px;padding:5px 10px;display:flex;flex-direction:column}
.hessdiag .tiles b{font-size:17px}.hessdiag small,.hessdiag i,.hessdiag .tiles span{opacity:.7;font-style:normal}
.hessdiag .badge{border:1px solid;border-radius:9px;padding:0 8px}.hessdiag .good{color:#15803d}
.hessdiag .mind{color:#b45309}.hessdiag .scroll{overflow-x:auto}
.hessdiag table{font-size:13px;border-collapse:collapse;margin:6px 0}
.hessdiag td,.hessdiag th{padding:2px 10px;white-space:nowrap;text-align:right}.hessdiag tbody th{text-align:left}
</style>"""

WIDTH = 120
"""Columns of the six lines; a status that is longer is cut there, and whole in `m.status`."""


def lines(m: Measurement) -> str:
    """What `repr` shows: the norm, its parts, on what and how, and where the rest is."""
    low, high = m.interval
    if m.norm.total.status == "exact":
        sure = facts.exact_for({"samples": m.samples})
    else:
        sure = f"{interval(low, high)} at {100 * m.confidence:g}%, {counted(m.replicates, 'replicate')}"
    doc = m.to_dict()["norm"]
    parts = [
        f"{name} {percent(doc[key])}"
        for name, key in (("Gauss-Newton", "share_gauss_newton"), ("functional", "share_functional"))
    ]
    told = m.provenance
    model = plain(told.get("model", "a model"), 60)
    how = f"method {told.get('method', '?')}, loss {plain(loss(told), 40)} {value(m.loss)}"
    other = [f"mean-scaled {value(m.mean_scaled)}", f"trace {value(m.trace.value)}"]
    if m.invariant is not None:
        other.append(f"invariant rms {value(m.invariant.rms)}")
    return "\n".join(
        [
            f"Measurement of {model}: {counted(m.parameters, 'parameter')}, {counted(m.samples, 'sample')}",
            f"  rms norm  {value(m.rms, digits(low, high))}, {sure}",
            f"  parts     {', '.join(parts)} of the sum of squares",
            f"  others    {', '.join(other)}",
            f"  status    {plain(m.status, WIDTH - 14 - len(how))}; {how}",
            "  more in   .rows() .plot() .norm .layers .groups .notes .provenance .save_html(path) .save_json(path)",
        ]
    )


def fragment(m: Measurement) -> str:
    """What a notebook shows: tiles, the status, norms by group, and by parameter when unfolded."""
    content = m.to_dict()
    head = f"{counted(m.parameters, 'parameter')}, {counted(m.samples, 'sample')}, {m.provenance.get('method', '?')}"
    notes = "".join(f"<li>{escape(note)}</li>" for note in facts.notes(content))
    layers = norms_table(content["layers"], None)
    return (
        f'{STYLE}<div class="hessdiag"><b>{escape(plain(m.provenance.get("model", "Measurement")))}</b> '
        f"<small>{escape(head)}</small>{tiles(content)}{badge(content)}"
        f"{norms_table(content['groups'], content['invariant_groups'])}"
        f"<details><summary>{counted(len(content['layers']), 'parameter')}</summary>{layers}</details>"
        + (f"<details><summary>notes</summary><ul>{notes}</ul></details>" if notes else "")
        + "</div>"
    )


def rows(m: Measurement, of: str) -> list[dict[str, Any]]:
    """One dictionary of plain numbers for each parameter or group; NaN where something is not known."""
    summaries = {"layers": m.layers, "groups": m.groups}[of]
    name = "parameter" if of == "layers" else "group"
    found = []
    for label, summary in summaries.items():
        row = {name: label, **_numbers(summary)}
        if of == "groups":
            invariant = m.invariant_groups.get(label)
            row["invariant_rms"] = math.nan if invariant is None else invariant.rms
        found.append(row)
    return found


def _numbers(summary: NormSummary) -> dict[str, Any]:
    e = summary.total
    shares = {
        key: math.nan if ratio is None else ratio.value
        for key, ratio in (
            ("share_gauss_newton", summary.share_gauss_newton),
            ("share_functional", summary.share_functional),
            ("cosine", summary.cosine),
        )
    }
    return {
        "entries": e.entries,
        "rms": e.rms,
        "low": e.low,
        "high": e.high,
        "mean_scaled": e.mean_scaled,
        **shares,
        "replicates": e.replicates,
        "status": e.status,
    }
