"""The documentation as a site: built strictly, every link of it followed, nothing asked of anybody else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

pytest.importorskip("mkdocs", reason="pip install 'hessdiag[docs]'")
pytest.importorskip("material", reason="pip install 'hessdiag[docs]'")
pytest.importorskip("mkdocstrings", reason="pip install 'hessdiag[docs]'")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(where)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING" not in done.stderr
    return where


class Links(HTMLParser):
    """Where a page points, what it loads, and the names in it that can be pointed at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.points: list[str] = []
        self.loads: list[str] = []
        self.names: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value for key, value in attrs if value}
        self.names |= {given[key] for key in ("id", "name") if key in given}
        if tag == "a" and "href" in given:
            self.points.append(given["href"])
        elif tag == "link" and given.get("rel") != "canonical" and "href" in given:
            self.loads.append(given["href"])
        elif "src" in given:
            self.loads.append(given["src"])


def test_every_link_leads_somewhere_and_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    pages = {path: Links(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    assert len(pages) > 25
    for path, page in pages.items():
        assert not [link for link in page.loads if re.match(r"(https?:)?//", link)], path
        for link in [*page.points, *page.loads]:
            target, name = urldefrag(link)
            if re.match(r"[a-z]+:", link) or (target.startswith("/") and path.name == "404.html"):
                continue
            found = (path.parent / unquote(target)).resolve() if target else path
            assert found.exists(), f"{path.relative_to(site)} -> {link}"
            if name and found in pages and not name.startswith("__"):
                assert unquote(name) in pages[found].names, f"{path.relative_to(site)} -> {link}"


def test_every_page_of_the_repository_is_a_page_of_the_site(site: Path) -> None:
    for path in (ROOT / "docs").glob("*.md"):
        assert (site / f"{path.stem}.html").exists(), path.name
    assert not (site / "building").exists()
    first = (site / "index.html").read_text(encoding="utf-8")
    assert "You need it" in first
    assert 'src="benchmarks/results/deletion.svg"' in first


def test_formulas_are_drawn_and_calls_have_their_signatures(site: Path) -> None:
    derivation = (site / "derivation.html").read_text(encoding="utf-8")
    assert derivation.count("<math") > 100
    assert "arithmatex" not in derivation
    reference = (site / "reference.html").read_text(encoding="utf-8")
    for name in ("measure", "diagonal", "Objective", "Measurement", "register_layer", "Watch", "load_checkpoint"):
        assert re.search(rf'id="hessdiag\.[\w.]*\b{name}"', reference), name
    assert "deterministic_check" in reference
