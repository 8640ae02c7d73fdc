"""One page with every figure, the correlations and the verdicts; pictures lie beside it, nothing comes from
a network.
"""

from __future__ import annotations

import html
import struct
from os.path import relpath
from pathlib import Path
from typing import Any

from experiments.correlation.verdicts import (
    CONTRADICTS,
    DOES_NOT,
    EXPLORATORY,
    HOLDS,
    NOT_TESTED,
    TRANSFERS,
    WORDS,
    Verdict,
    sentence,
)
from experiments.figures import findings, forest
from experiments.figures.build import TITLES, Built, Picture
from hessdiag.store.files import replace_file

STYLE = (
    """
:root { color-scheme: light dark; --line: #ccc; --soft: #666; --panel: #f6f6f6; --ground: #fff; --shade: #e4e4e4;
  --less: #0072b2; --more: #d55e00; --good: #15803d; --bad: #b91c1c; }
@media (prefers-color-scheme: dark) { :root { --line: #444; --soft: #aaa; --panel: #222; --ground: #121212;
  --shade: #333; --less: #56b4e9; --more: #e69f00; --good: #4ade80; --bad: #f87171; } figure img { background: #fff; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem;
  background: var(--ground); }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem;
  border-top: 1px solid var(--line); padding-top: 1rem; }
figure { margin: 1rem 0; } figure img { max-width: 100%; height: auto; display: block; }
figcaption, .soft { color: var(--soft); font-size: .87rem; }
.badge { display: inline-block; border: 1px solid; border-radius: 10px; padding: 0 .6em; font-size: .8rem;
  color: var(--soft); white-space: nowrap; }
.good { color: var(--good); } .bad { color: var(--bad); } .exploratory { border-style: dashed; }
.missing { background: var(--panel); padding: .6rem .8rem; border-radius: 6px; overflow-x: auto; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .55rem; text-align: left; vertical-align: top; }
tr > :first-child { position: sticky; left: 0; background: var(--ground); }
td.number { white-space: nowrap; font-variant-numeric: tabular-nums; }
nav a { margin-right: .8em; white-space: nowrap; }
@media (max-width: 640px) { figure img.wide { max-width: none; width: var(--wide); } th, td { padding: .2rem .35rem; }
  tr > :first-child { min-width: 8.5rem; overflow-wrap: break-word; } td:not(.number) { min-width: 4.5rem; } }
"""
    + forest.STYLE
)
PANEL = 340
"""Pixels of a panel on a phone: pictures with several are drawn so wide, and scrolled."""
GOOD, BAD = (HOLDS, TRANSFERS), (CONTRADICTS, DOES_NOT)


def write(built: Built, path: Path) -> None:
    """Write the page to `path`; pictures are linked by their place relative to it."""
    groups: dict[str, list[Picture]] = {name: [] for name in TITLES}
    for picture in built.pictures:
        groups[picture.figure].append(picture)
    shown = {name: pictures for name, pictures in groups.items() if pictures}
    links = " ".join(f'<a href="#{name}">{html.escape(TITLES[name].split(".")[0].split("(")[0])}</a>' for name in shown)
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width, initial-scale=1'>",
        "<title>Figures</title>",
        f"<style>{STYLE}</style>",
        "<h1>Activation curvature, Hessian diagonals and robustness: every figure from stored results</h1>",
        "<p>Each figure names the tier it comes from: <b>smoke</b> is digits on two CPU cores, <b>quick</b> a "
        "shortened protocol, <b>campaign</b> all of CIFAR with a net of a quarter of the width on two CPU cores, "
        "<b>paper</b> the published one. The grey band is max|σ''| from 4 to 10, the range "
        "that the paper (arXiv 2603.23860) calls optimal. Bars are one standard deviation of a seed; with a single "
        "seed they are 95% intervals of the draw of test images, or of the norm's measurement, and say nothing of "
        "other seeds. Curves that have bars stand a little aside of each other. Networks that did not learn are named, "
        "not drawn, and left out of the findings; verdicts are of all runs, and name them. Stars are the paper's "
        "printed numbers, where the data and the network are the paper's.</p>",
        f"<nav><a href='#findings'>Findings</a> {links} <a href='#verdicts'>Verdicts</a> "
        "<a href='#shapes'>Peaks and U-shapes</a> <a href='#correlations'>Correlations</a></nav>",
        findings.summary(built.analyses),
        _counts(built.verdicts),
    ]
    for name, pictures in shown.items():
        parts.append(f"<h2 id={name}>{html.escape(TITLES[name])}</h2>")
        parts += [_picture(picture, path.parent) for picture in pictures]
    parts += [_verdicts(built, path.parent), findings.curves(built.analyses), _correlations(built.analyses)]
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, ("\n".join(parts) + "\n").encode())


def _picture(picture: Picture, home: Path) -> str:
    if picture.path is None:
        return f"<div class=missing>No results yet. <code>{html.escape(picture.command)}</code></div>"
    source = html.escape(Path(relpath(picture.path, home)).as_posix())
    table = picture.path.with_suffix(".md")
    body = _markdown(table) if table.exists() else ""
    wide, high = _size(picture.path.with_suffix(".png"))
    # The tier and all that the caption says stand in the picture too, which may leave the page: shown once.
    alt = html.escape(f"{picture.title}: {picture.caption}")
    missing = f" {html.escape(picture.missing)}" if picture.missing else ""
    return (
        f"<figure><span class=badge>{html.escape(picture.tier)}</span>{body}<div class=scroll><a href='{source}.svg'>"
        f"<img src='{source}.png' width={wide} height={high} alt='{alt}' loading=lazy{_on_a_phone(wide)}></a></div>"
        f"<figcaption><a href='{source}.svg'>SVG</a>{missing}</figcaption></figure>"
    )


def _on_a_phone(width: int) -> str:
    """As wide as its panels need there; they are 3.6 inches at 150 dots, as a rule."""
    panels = round(width / 540)
    return f" class=wide style='--wide:{PANEL * panels}px'" if panels > 1 else ""


def _size(png: Path) -> tuple[int, int]:
    """Width and height as the file's head says."""
    width, height = struct.unpack(">II", png.read_bytes()[16:24])
    return width, height


def _badge(word: str, *, exploratory: bool = False) -> str:
    """A verdict's word; dashed where it is exploratory."""
    kind = " good" if word in GOOD else " bad" if word in BAD else ""
    kind += " exploratory" if exploratory else ""
    return f"<span class='badge{kind}'>{html.escape(word)}</span>"


def _exploratory(verdict: Verdict) -> bool:
    """Whether no setting that says anything of it says it by a rule from before its results."""
    return all(cell.status == EXPLORATORY for cell in verdict.cells if cell.word != NOT_TESTED)


def _counts(verdicts: dict[str, Verdict]) -> str:
    """How many claims have which verdict."""
    counts = {word: sum(v.verdict == word for v in verdicts.values()) for word in WORDS}
    told = " ".join(f"{count}\N{NO-BREAK SPACE}{_badge(word)}" for word, count in counts.items() if count)
    return f"<p>Of the <a href='#verdicts'>{len(verdicts)} claims</a> that experiments can decide: {told}.</p>"


def _markdown(path: Path) -> str:
    """The table that a Markdown file holds, as HTML."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    cells = [[c.strip().replace("\0", "|") for c in line.replace("\\|", "\0").strip("|").split("|")] for line in lines]
    return findings.table(cells[0], cells[2:])


def _verdicts(built: Built, home: Path) -> str:
    tested = [(name, verdict) for name, verdict in built.verdicts.items() if verdict.verdict != NOT_TESTED]
    rest = len(built.verdicts) - len(tested)
    settings = list(dict.fromkeys(c.setting for _, v in tested for c in v.cells if c.word != NOT_TESTED))
    words = {
        (name, c.setting): _badge(c.word, exploratory=c.status == EXPLORATORY) for name, v in tested for c in v.cells
    }
    matrix = [
        [
            html.escape(name),
            _badge(v.verdict, exploratory=_exploratory(v)),
            *(words.get((name, setting), "") for setting in settings),
        ]
        for name, v in tested
    ]
    lines = [[name, sentence(cell)] for name, v in tested for cell in v.cells if cell.word != NOT_TESTED]
    told = ""
    if (home / "ledger" / "ledger.html").exists():
        told = "; the <a href='ledger/ledger.html'>ledger</a> quotes each claim"
    return (
        "<h2 id=verdicts>Verdicts on the paper's empirical claims</h2><p>By the rules of "
        "<code>experiments/correlation/rules.toml</code>: each setting says what it shows of each claim, none hides "
        f"another; a dashed line marks what is exploratory{told}. "
        f"{rest} further claims are not tested by what is here.</p>"
        + (findings.table(("claim", "verdict", *settings), matrix, markup=True) if lines else "")
        + ("<details><summary>evidence</summary>" + findings.table(("claim", "evidence"), lines) + "</details>")
        * bool(lines)
    )


def _correlations(analyses: dict[str, Any]) -> str:
    parts = [
        "<h2 id=correlations>Correlation of log-norm with robust accuracy</h2><p class=soft>Over the configurations of "
        "a sweep, seeds averaged: descriptions, for smooth curves correlate by chance. Given activation and seed: "
        "among runs of one activation, with 95% interval and p-value.</p>"
    ]
    for sweep, name, report in findings.experiments(analyses):
        lines = [
            [
                c["norm"],
                c["place"],
                c["kind"],
                c["given"],
                f"{c['value']:+.2f}",
                "-" if c["low"] is None else f"[{c['low']:+.2f}, {c['high']:+.2f}]",
                "-" if c["p_value"] is None else f"{c['p_value']:.3g}",
            ]
            for c in report["correlations"]
            if c["kind"] == "spearman" or c["place"] == "train/clean" or c["p_value"] is not None
        ]
        head = ("norm", "measured on", "coefficient", "given", "value", "interval", "p")
        if lines:
            summary = html.escape(f"{sweep}: {name} ({findings.size(report)})")
            parts.append(f"<details><summary>{summary}</summary>{findings.table(head, lines)}</details>")
    return "\n".join(parts)
