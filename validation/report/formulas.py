"""LaTeX as SVG without a network: matplotlib's mathtext gives the outlines, written here as one path."""

from __future__ import annotations

import html
import re
from functools import lru_cache

from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

SIZE = 15.0
_COMMANDS = {1: "M", 2: "L", 3: "Q", 4: "C"}
_POINTS = {1: 1, 2: 1, 3: 2, 4: 3}


def mathtext(latex: str) -> str:
    """The formula in the part of LaTeX that mathtext knows: braces around arguments, delimiters that grow."""
    text = re.sub(r"\\frac(?![{a-zA-Z])\s*(\\[a-zA-Z]+|\w)", r"\\frac{\1}", latex)
    text = re.sub(r"\\frac\{(\\?\w+)\}(?!\{)\s*(\\[a-zA-Z]+|\w)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac(\\[a-zA-Z]+|\d)", r"\\frac{\1}", text)
    text = re.sub(r"\\le(?![a-zA-Z])", r"\\leq ", text)
    text = re.sub(r"\\ge(?![a-zA-Z])", r"\\geq ", text)
    text = re.sub(r"\\[Bb]igg?l", r"\\left", text)
    text = re.sub(r"\\[Bb]igg?r", r"\\right", text)
    text = re.sub(r"\\frac(?![a-zA-Z])", r"\\dfrac", text)
    return text.replace(r"\textstyle", "").replace(r"\iff", r"\Leftrightarrow ")


@lru_cache(maxsize=512)
def svg(latex: str) -> str:
    """One inline SVG; its text alternative is the LaTeX itself."""
    outline = TextPath((0, 0), f"${mathtext(latex)}$", size=SIZE, prop=FontProperties(family="DejaVu Serif"))
    vertices, codes = outline.vertices, outline.codes
    if codes is None or len(vertices) == 0:
        return f"<code>{html.escape(latex)}</code>"
    drawn = [(x, y) for (x, y), code in zip(vertices, codes, strict=True) if code != 79]
    left, right = min(x for x, _ in drawn) - 1, max(x for x, _ in drawn) + 1
    low, high = min(y for _, y in drawn) - 1, max(y for _, y in drawn) + 1
    parts: list[str] = []
    i = 0
    while i < len(codes):
        code = int(codes[i])
        if code == 79:
            parts.append("Z")
            i += 1
            continue
        count = _POINTS[code]
        points = " ".join(f"{x - left:.1f} {high - y:.1f}" for x, y in vertices[i : i + count])
        parts.append(_COMMANDS[code] + points)
        i += count
    width, height = right - left, high - low
    label = html.escape(latex, quote=True)
    return (
        f'<svg class="formula" role="img" aria-label="{label}" viewBox="0 0 {width:.1f} {height:.1f}" '
        f'style="width:{width:.0f}px"><path d="{"".join(parts)}"/></svg>'
    )
