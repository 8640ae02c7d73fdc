"""What mkdocs does to the pages: some of them stand elsewhere in the repository, and formulas become MathML.

Links between Markdown files are those of the repository; here they are turned into those of the site. What a link names
that is no page (a module) is left as its words. Nothing is fetched, and no script is needed for a formula.
"""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
ELSEWHERE = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "house.md",
    "benchmarks/README.md": "benchmarks.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
"""Pages that are not in docs/, by their place in the repository."""
HOME = {page: source for source, page in ELSEWHERE.items()}
ASSETS = (
    "benchmarks/results/*.svg",
    "results/gallery.html",
    "results/figures/*.png",
    "results/figures/*.svg",
    "results/ledger/*",
)
FENCE = re.compile(r"^```.*?^```$", re.S | re.M)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)


def on_files(files: Files, config: Any) -> Files:
    """Add what stands elsewhere."""
    for source, page in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for pattern in ASSETS:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links of the repository become links of the site, outside of code."""
    here = page.file.src_uri
    source = HOME.get(here, f"docs/{here}")
    known = {file.src_uri for file in files}
    parts, start = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [_links(markdown[start : fence.start()], source, here, known), fence.group()]
        start = fence.end()
    return "".join([*parts, _links(markdown[start:], source, here, known)])


def _links(text: str, source: str, here: str, known: set[str]) -> str:
    def moved(link: re.Match[str]) -> str:
        mark, words, target = link.groups()
        path, hash_, anchor = target.partition("#")
        if not path or ":" in path:
            return link.group()
        place = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        page = ELSEWHERE.get(place, place.removeprefix("docs/"))
        if page in known:
            return f"{mark}[{words}]({posixpath.relpath(page, posixpath.dirname(here) or '.')}{hash_}{anchor})"
        return words if (ROOT / place).exists() else link.group()  # what is nowhere is for mkdocs to complain of

    return LINK.sub(moved, text)


def on_page_content(content: str, page: Any, config: Any, files: Files) -> str:
    """Formulas as MathML, which every browser draws by itself."""

    def drawn(formula: re.Match[str]) -> str:
        kind, tex = formula.group(1), html.unescape(formula.group(2)).strip()
        if kind == "span":
            return convert(tex)
        return f'<div style="overflow-x: auto">{convert(tex, display="block")}</div>'

    return FORMULA.sub(drawn, content)
