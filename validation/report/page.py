"""The ledger as one self-contained page: formulas as outlines, figures inside, nothing loaded from anywhere."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure as Canvas

from hessdiag.store.files import write_bytes
from validation.ledger import Ledger
from validation.report.formulas import svg
from validation.report.terminal import _number
from validation.studies import STUDIES

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:0 auto;max-width:1060px;padding:24px;color:#1c2330;background:#fff}
h1{font-size:26px;margin:0 0 4px}h2{font-size:20px;margin:36px 0 8px;border-bottom:1px solid #d6dbe4;padding-bottom:4px}
.counts span{display:inline-block;margin:4px 10px 4px 0}
.badge{border-radius:4px;padding:1px 8px;font-size:13px;font-weight:600;white-space:nowrap;color:#fff;background:#667}
.proved,.verified-exactly,.holds-numerically{background:#1f7a3f}
.as-defined,.consistent-in-print{background:#3f6f8f}.holds-under-conditions{background:#9a6700}
.refuted,.contradicted-by-measurement{background:#b3261e}.not-tested,.inconclusive{background:#6b7280}
.holds,.transfers{background:#1f7a3f}.depends-on-the-setting{background:#9a6700}
.contradicts,.does-not-transfer,.no-difference-beyond-δ{background:#b3261e}
article{border:1px solid #dfe3ea;border-radius:6px;margin:10px 0;padding:10px 14px}
article header{display:flex;gap:10px;align-items:baseline;flex-wrap:wrap}
article header b{font-family:ui-monospace,monospace}article header i{color:#5b6472;font-style:normal;font-size:13px}
article p{margin:6px 0}.formula{max-width:100%;height:auto;display:block;margin:8px 0}
ul{margin:6px 0;padding-left:20px}li{margin:2px 0;overflow-wrap:anywhere}.fails{color:#b3261e;font-weight:600}
.small{font-size:13px;color:#3d4654;overflow-wrap:anywhere}code{font-size:12.5px}
table{border-collapse:collapse;font-size:13px;margin:8px 0}
td,th{border:1px solid #dfe3ea;padding:3px 8px;text-align:left}
td.n{text-align:right;font-variant-numeric:tabular-nums}figure{margin:10px 0}figure img{max-width:100%}
.wide{overflow-x:auto}details summary{cursor:pointer;color:#3d4654;font-size:13px}nav a{margin-right:14px}
""".strip()

SECTIONS: tuple[tuple[str, Callable[[str, str], bool]], ...] = (
    ("Equations 1 to 33", lambda name, kind: name[0] == "E"),
    (
        "Statements of mathematics and arithmetic",
        lambda name, kind: name[0] != "E" and kind not in ("empirical", "theorem"),
    ),
    ("Our own, from docs/derivation.md", lambda name, kind: kind == "theorem"),
    ("Claims that rest on experiments", lambda name, kind: kind == "empirical"),
)


def write_page(ledger: Ledger, path: Path) -> None:
    """Write the page."""
    write_bytes(path, page(ledger).encode())


def page(ledger: Ledger) -> str:
    """The whole page as HTML."""
    counts = "".join(f"<span>{_badge(v)} {n}</span>" for v, n in ledger.counts().items())
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>Ledger of claims</title><style>{STYLE}</style>",
        "<h1>Ledger of claims</h1>",
        "<p>Each claim of <a href='https://arxiv.org/abs/2603.23860'>arXiv 2603.23860</a>, with the verdict that its "
        f"own check computed ({ledger.mode} run). One claim alone: <code>python -m validation --claim E28</code>.</p>",
        f'<p class="counts">{counts}</p>',
        '<nav><a href="#studies">Studies</a>',
        *(f'<a href="#s{i}">{html.escape(title)}</a>' for i, (title, _) in enumerate(SECTIONS)),
        "</nav>",
    ]
    for number, (title, belongs) in enumerate(SECTIONS):
        chosen = [(n, r) for n, r in ledger.claims.items() if belongs(n, r["kind"])]
        parts.append(f'<h2 id="s{number}">{html.escape(title)} ({len(chosen)})</h2>')
        parts += [_claim(name, record) for name, record in chosen]
        if title.startswith("Claims that rest"):
            parts.insert(len(parts) - len(chosen), matrix(ledger))
    parts.append('<h2 id="studies">Studies</h2>')
    parts += [_study(name, record) for name, record in ledger.studies.items()]
    return "\n".join(parts) + "</html>\n"


def matrix(ledger: Ledger) -> str:
    """Claims by settings: the word that each stored sweep gives; then this project's own hypotheses."""
    rows: dict[str, tuple[str, dict[str, str]]] = {}
    for claim, record in ledger.claims.items():
        for name, words in (record.get("settings") or {}).items():
            if name[:2] not in ("T1", "T2") or words:
                rows[name] = (claim, words)
    rows |= {name: ("", record["settings"]) for name, record in ledger.hypotheses.items()}
    said = {setting for _, words in rows.values() for setting, word in words.items() if _said(word)}
    settings = sorted(said, key=lambda setting: (setting.startswith("tier "), setting))
    if not settings:
        return '<p class="small">No results of experiments are stored.</p>'
    head = "".join(f"<th>{html.escape(setting)}</th>" for setting in settings)
    lines = []
    for name, (claim, words) in rows.items():
        about = ledger.hypotheses.get(name, {}).get("statement", "")
        link = f'<a href="#{html.escape(claim)}">{html.escape(name)}</a>' if claim else html.escape(f"{name}: {about}")
        cells = "".join(f"<td>{_word(words.get(setting, 'not tested'))}</td>" for setting in settings)
        lines.append(f"<tr><td>{link}</td>{cells}</tr>")
    return (
        '<p class="small">Claims by settings: what each stored sweep says, by the rules of '
        "<code>experiments/correlation/rules.toml</code> (docs/rules.md). [adversarial] and [invariant] judge the same "
        "rule by another norm; names with H. are hypotheses of this project. * exploratory: the results were there "
        "before the rule. Empty: not tested.</p>"
        f'<div class="wide"><table><tr><th></th>{head}</tr>{"".join(lines)}</table></div>'
    )


def _said(word: str) -> bool:
    return word.rstrip("*") != "not tested"


def _word(word: str) -> str:
    bare = word.rstrip("*")
    return "" if not _said(word) else f'<span class="badge {bare.replace(" ", "-")}">{html.escape(word)}</span>'


def _badge(verdict: str) -> str:
    return f'<span class="badge {verdict.replace(" ", "-")}">{verdict}</span>'


def _claim(name: str, record: dict[str, Any]) -> str:
    e = html.escape
    parts = [f'<article id="{e(name)}"><header><b>{e(name)}</b> {_badge(record["verdict"])}']
    if record.get("reach"):
        parts.append(f"<i>{e(record['reach'])}</i>")
    parts.append(f"<i>{e(record['where'])}; {record['kind']}</i></header><p>{e(record['statement'])}</p>")
    if record["formula"]:
        parts.append(svg(record["formula"]))
    for surprise in record.get("surprises", []):
        parts.append(f'<p class="fails">not foreseen by the check: {e(surprise)}</p>')
    for label in ("correction", "counterexample", "note", "error"):
        if record.get(label):
            parts.append(f'<p class="small"><b>{label}:</b> {e(record[label])}</p>')
    if record["findings"]:
        parts.append(_findings(record["findings"]))
    else:
        parts.append(f'<p class="small">{e(record["summary"])}</p>')
    parts.append(f'<p class="small">check <code>{e(record["check"])}</code></p></article>')
    return "".join(parts)


def _findings(findings: list[dict[str, Any]]) -> str:
    rows = []
    for found in findings:
        mark = "holds" if found["holds"] else '<span class="fails">fails</span>'
        scope = f" <i>within: {html.escape(found['condition'])}</i>" if found["condition"] else ""
        number = "" if found["figure"] is None else f" &mdash; {html.escape(_number(found['figure']))}"
        kind = "exact" if found["exact"] else "measured"
        detail = f"<br>{html.escape(found['detail'])}" if found["detail"] else ""
        rows.append(f"<li>{mark} ({kind}){scope}: {html.escape(found['statement'])}{number}{detail}</li>")
    body = f'<ul class="small">{"".join(rows)}</ul>'
    return body if len(rows) <= 4 else f"<details><summary>{len(rows)} findings</summary>{body}</details>"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f'<td class="n">{value:.4g}</td>'
    if isinstance(value, int):
        return f'<td class="n">{value}</td>'
    return f"<td>{'' if value is None else html.escape(str(value))}</td>"


def _study(name: str, record: dict[str, Any]) -> str:
    head = "".join(f"<th>{html.escape(c)}</th>" for c in record["columns"])
    rows = "".join(f"<tr>{''.join(_cell(v) for v in row)}</tr>" for row in record["rows"])
    table = f"<table><tr>{head}</tr>{rows}</table>"
    if len(record["rows"]) > 14:
        table = f"<details><summary>table of {len(record['rows'])} rows</summary>{table}</details>"
    notes = "".join(f'<p class="small">{html.escape(note)}</p>' for note in record["notes"])
    error = f'<p class="fails">{html.escape(record["error"])}</p>' if record.get("error") else ""
    picture = "" if record.get("error") else _picture(name, record)
    return (
        f'<article id="study-{html.escape(name)}"><header><b>{html.escape(name)}</b>'
        f"<i>{html.escape(record['title'])}</i></header>{error}{picture}{table}"
        f"{_findings(record['findings']) if record['findings'] else ''}{notes}</article>"
    )


def _picture(name: str, record: dict[str, Any]) -> str:
    drawn = draw(name, record)
    if drawn is None:
        return ""
    coded = base64.b64encode(drawn).decode()
    return f'<figure><img alt="{html.escape(record["title"])}" src="data:image/svg+xml;base64,{coded}"></figure>'


def draw(name: str, record: dict[str, Any]) -> bytes | None:
    """The study's picture as SVG, drawn from its stored table; None if it has none."""
    drawing = STUDIES[name].draw if name in STUDIES else None
    if drawing is None or not record["rows"]:
        return None
    canvas = Canvas(figsize=(10, 3.6), layout="constrained")
    drawing(record, canvas)
    stream = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        canvas.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()
