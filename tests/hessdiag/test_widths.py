"""No digit is lost to a narrow terminal: every number printed at any width is one of those printed with room for all."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from hessdiag import activations
from hessdiag.checkpoint import inspect_checkpoint
from hessdiag.cli.program import app
from hessdiag.examples import example_path
from hessdiag.show.columns import Column, fold, print_table
from hessdiag.show.comparison import compare, print_comparison
from hessdiag.show.curve import print_curvature
from hessdiag.show.inspection import print_summary
from hessdiag.show.table import print_measurement
from hessdiag.show.text import value

WIDTHS = range(40, 121)
NUMBER = re.compile(r"\d[\d,]*\.\d+(?:e[+-]\d+)?%?|\d+e[+-]\d+|\d+(?:,\d{3})+|\d+%")


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    """A measurement with replicates, so that there are intervals."""
    args = ["measure", "digits-example", "--samples", "8", "--method", "propagation", "--max-replicates", "10"]
    found = CliRunner().invoke(app, [*args, "--json", "-"])
    return dict(json.loads(found.stdout))


@pytest.fixture(scope="module")
def long(content: dict[str, Any]) -> dict[str, Any]:
    """The same with numbers and names as long as they come."""
    changed: dict[str, Any] = json.loads(json.dumps(content))
    summaries = [changed["norm"], *changed["layers"].values(), *changed["groups"].values()]
    for number, summary in enumerate(summaries):
        for key in ("rms", "low", "high", "mean_scaled"):
            summary["total"][key] *= 1.2345e-6
        summary["total"]["entries"] = 10**6 + 1234 * number
        summary["share_gauss_newton"]["value"] *= 123.0
    changed["rms"], changed["interval"] = changed["norm"]["total"]["rms"], [
        changed["norm"]["total"][end] for end in ("low", "high")
    ]  # fmt: skip
    changed["layers"] = {f"module.backbone.stage3.{name}": row for name, row in changed["layers"].items()}
    return changed


def _printed(show: Callable[[Console], object], width: int) -> str:
    text = io.StringIO()
    show(Console(file=text, width=width, highlight=False, markup=False, emoji=False))
    return text.getvalue()


def _numbers(text: str) -> set[str]:
    return set(NUMBER.findall(text))


def _check(show: Callable[[Console], object], needed: set[str]) -> None:
    """At every width: no line too long, no number that is not one of the whole, and none of `needed` missing."""
    whole = _numbers(_printed(show, 400))
    assert needed <= whole
    for width in WIDTHS:
        text = _printed(show, width)
        assert max(map(len, text.splitlines())) <= width, width
        assert _numbers(text) <= whole, (width, sorted(_numbers(text) - whole))
        assert needed <= _numbers(text), (width, sorted(needed - _numbers(text)))


def _norms(content: dict[str, Any]) -> set[str]:
    rows = [*content["layers"].values(), *content["groups"].values()]
    return {shown for row in rows if "." in (shown := value(row["total"]["rms"]))}


def test_measure_at_every_width(content: dict[str, Any]) -> None:
    _check(lambda out: print_measurement(content, out), _norms(content))


def test_measure_with_long_numbers_at_every_width(long: dict[str, Any]) -> None:
    _check(lambda out: print_measurement(long, out), _norms(long))


def test_compare_at_every_width(content: dict[str, Any], long: dict[str, Any]) -> None:
    rows = compare([("first", content), ("a-name-of-more-than-twenty-letters", long), ("third", content)])
    ratios = {value(row.ratio.value) for row in rows if row.ratio is not None and row.ratio.value != 1}
    assert ratios
    _check(lambda out: print_comparison(out, rows, confidence=0.95), ratios)


def test_inspect_at_every_width() -> None:
    path = example_path("digits-example")
    assert path is not None
    found = inspect_checkpoint(path)
    _check(lambda out: print_summary(out, found, tensors=True), {f"{found.parameters:,}", "0.972"})


@pytest.mark.parametrize("name", ["mish", "rct:beta=1,alpha=14", "relu", "elu"])
def test_curvature_at_every_width(name: str) -> None:
    found = activations.curvature(name)
    needed = {f"{found.value:.10g}"} if name == "mish" else set()
    _check(lambda out: print_curvature(out, name, name, found), needed)


def test_columns_fall_away_in_order_and_names_fold_before_them() -> None:
    columns = (Column("name", text=True), Column("kept"), Column("first", 2), Column("extra", 5))
    rows = [["a.name.of.some.length.for.folding", "1.234", "2.345", "3.456"]]
    shown = [print_table(Console(file=io.StringIO(), width=w), columns, rows) for w in (80, 40, 28, 12)]
    assert [len(heads) for heads in shown] == [4, 3, 2, 2]
    assert "kept" in shown[-1]


def test_names_fold_after_a_dot() -> None:
    assert fold("blocks.1.shortcut.0.weight", 21).split("\n") == ["blocks.1.shortcut.0.", "weight"]
    assert fold("short", 21) == "short"
    assert "".join(fold("x" * 50, 12).split("\n")) == "x" * 50
