"""One page that holds everything: numbers, pictures as inline SVG, no script, nothing fetched from anywhere."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from hessdiag.errors import DataError
from hessdiag.measuring.diagonal import Diagonal
from hessdiag.show import plot
from hessdiag.show import sentences as facts
from hessdiag.show.histogram import histogram
from hessdiag.show.style import CSS, PHONE
from hessdiag.show.text import interval, percent, percent_interval, plain, spread, value
from hessdiag.store.files import BadFileError, path_text, write_bytes


def write_page(path: Path, content: dict[str, Any], diagonal: Diagonal | None) -> None:
    """The page of one measurement, replaced as a whole or not at all."""
    try:
        write_bytes(path, page(content, diagonal).encode())
    except BadFileError as error:
        raise DataError(f"{path_text(path)}: {error}") from None


def page(content: dict[str, Any], diagonal: Diagonal | None) -> str:
    """The page's text."""
    title = facts.title(content)
    body = [
        f"<h1>{escape(title)}</h1>",
        tiles(content),
        badge(content),
        _rows(facts.accuracy_rows(content)),
        *_pictures(content, diagonal),
        "<h2>By group</h2>",
        norms_table(content["groups"], content["invariant_groups"]),
        "<h2>By parameter</h2>",
        norms_table(content["layers"], None),
        _curvature(content["effective_curvature"]),
        "<h2>Measured on</h2>",
        _rows(facts.model_rows(content) + facts.data_rows(content) + facts.run_rows(content)),
        _notes(content),
        f"<footer>{escape(_versions(content))}</footer>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # A page of numbers needs nothing from elsewhere; names out of a checkpoint must not make it ask.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{CSS}</style></head>\n<body><main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main></body></html>\n"
    )


def badge(content: dict[str, Any]) -> str:
    """The status: a word in a colour, and what it means."""
    word, told, good = facts.badge(content)
    kind = "good" if good else "mind"
    return f'<p class="status"><b class="badge {kind}">{escape(word)}</b> {escape(told)}</p>'


def tiles(content: dict[str, Any]) -> str:
    """The numbers of the whole."""
    norm, trace, invariant = content["norm"], content["trace"], content["invariant"]
    total = norm["total"]
    root = total["entries"] ** 0.5
    low, high = (x / root if isinstance(x, float) else x for x in (total["low"], total["high"]))
    sure = f" at {100 * content['confidence']:g}%"
    shown = [
        (
            "rms norm",
            value(content["rms"]),
            facts.exact_for(content) if total["low"] == total["high"] else _bounds(total["low"], total["high"], sure),
            "√(Σh²/p)",
        ),
        *facts.spread_lines(content),
        ("mean-scaled norm", value(content["mean_scaled"]), _bounds(low, high, sure), "√(Σh²)/p"),
        (
            "Gauss-Newton",
            percent(norm["share_gauss_newton"]),
            percent_interval(norm["share_gauss_newton"]),
            "of Σh²",
        ),
        (
            "functional",
            percent(norm["share_functional"]),
            percent_interval(norm["share_functional"]),
            "of Σh²",
        ),
    ]
    if invariant is not None:
        bounds = _bounds(invariant["low"], invariant["high"], "")
        shown.append(("invariant rms", value(invariant["rms"]), bounds, "entries θ²h, which rescaling leaves alone"))
    shown.append(("trace", value(trace["value"]), _bounds(trace["low"], trace["high"], ""), "Σh"))
    cells = [
        f"<div><small>{escape(label)}</small><b>{escape(amount)}</b><span>{escape(bounds)}</span>"
        f"<i>{escape(meaning)}</i></div>"
        for label, amount, bounds, meaning in shown
    ]
    return f'<section class="tiles">{"".join(cells)}</section>'


def _bounds(low: Any, high: Any, sure: str) -> str:
    return "exact" if low == high else interval(low, high) + sure


def _pictures(content: dict[str, Any], diagonal: Diagonal | None) -> list[str]:
    found = []

    def add(draw: Callable[[float], Any], heading: str, words: str) -> None:
        found.append(_figure([draw(width) for width in (plot.WIDE, plot.NARROW)], heading, words))

    if diagonal is not None and not diagonal.per_sample:
        exact = diagonal.status == "exact"
        noisy = (
            ""
            if exact
            else (
                " Broadened by noise: every entry is its true value plus an error of the size shown, so that "
                "small entries look larger than they are and some change sign. The norms above are free of this."
            )
        )
        entries, errors = diagonal.total, diagonal.standard_errors
        words = f"How many entries h have which size.{noisy}"
        add(lambda width: histogram(entries, errors, exact=exact, width=width), "The diagonal", words)
    add(lambda width: plot.norms(content["layers"], width=width), "Norm of each parameter", "Lines: intervals.")
    if len(content["history"]) > 1:
        rtol, history, sure = content.get("cli", {}).get("rtol"), content["history"], content["confidence"]
        words = "The interval after so many replicates. It allows for stopping as soon as it is narrow."
        add(lambda width: plot.convergence(history, confidence=sure, rtol=rtol, width=width), "Convergence", words)
    elif content["replicates"] == 0:
        found.append("<h2>Convergence</h2><p>None to show: the diagonal is exact.</p>")
    if plot.parts(content["layers"]) is not None:
        words = "One point per parameter; those with a part that is exactly zero, or not told from it, are left out."
        add(lambda width: plot.parts(content["layers"], width=width), "Gauss-Newton against functional part", words)
    else:
        found.append(
            "<h2>Gauss-Newton against functional part</h2><p>No parameter has both parts: piecewise-linear "
            "activations bend nothing, or only the total was measured.</p>"
        )
    return found


def _figure(drawn: Sequence[Any], heading: str, words: str) -> str:
    """A picture drawn for a desk and for a phone, of which a browser shows the one that fits."""
    # As an image rather than inline markup: ids inside one picture cannot meet those of another.
    wide, narrow = (
        "data:image/svg+xml;base64," + base64.b64encode(plot.svg(figure).encode()).decode() for figure in drawn
    )
    return (
        f"<figure><h2>{escape(heading)}</h2><picture>"
        f'<source media="(max-width:{PHONE}px)" srcset="{narrow}">'
        f'<img alt="{escape(heading)}" src="{wide}"></picture><figcaption>{escape(words)}</figcaption></figure>'
    )


def norms_table(rows: dict[str, Any], invariant: dict[str, Any] | None) -> str:
    """One line for each parameter or group."""
    heads = ["", "entries", "rms", "interval", "±", "mean-scaled", "Gauss-Newton", "functional"]
    heads += ["invariant rms"] if invariant is not None else []
    lines = []
    for name, summary in rows.items():
        total = summary["total"]
        exact = spread(total) == "exact"
        cells = [
            f"{total['entries']:,}",
            value(total["rms"]),
            "" if exact else interval(total["low"], total["high"], 3),
            spread(total),
            value(total["mean_scaled"]),
            percent(summary["share_gauss_newton"]),
            percent(summary["share_functional"]),
        ]
        if invariant is not None:
            cells.append(value(invariant[name]["rms"]) if name in invariant else "n/a")
        lines.append(_line(plain(name), cells))
    return _table(heads, lines)


def _curvature(pairs: list[dict[str, Any]]) -> str:
    if not pairs:
        return ""
    heads = ["normalisation", "activation", "max|σ''|", "mean |γ|·max|σ''|", "largest"]
    keys = ("max_curvature", "mean", "largest")
    lines = [_line(plain(p["layer"]), [plain(p["activation"]), *(value(p[key]) for key in keys)]) for p in pairs]
    return "<h2>Effective curvature |γ|·max|σ''|</h2>" + _table(heads, lines)


def _line(name: str, cells: list[str]) -> str:
    return f"<tr><th>{escape(name)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"


def _table(heads: list[str], lines: list[str]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in heads)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _rows(rows: list[tuple[str, str]]) -> str:
    if not rows:
        return ""
    return "<dl>" + "".join(f"<dt>{escape(a)}</dt><dd>{escape(b)}</dd>" for a, b in rows) + "</dl>"


def _notes(content: dict[str, Any]) -> str:
    found = facts.notes(content)
    return "<h2>Notes</h2><ul>" + "".join(f"<li>{escape(note)}</li>" for note in found) + "</ul>" if found else ""


def _versions(content: dict[str, Any]) -> str:
    told = content["provenance"]
    names = ("hessdiag", "torch", "numpy", "python")
    return plain(", ".join(f"{name} {told[name]}" for name in names) + f"; {told['platform']}; {told['when']}")
