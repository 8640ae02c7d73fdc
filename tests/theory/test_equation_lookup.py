"""From any equation number to its check in one step, and what the text reads off the derivation (A.5)."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from hessdiag.errors import UnknownNameError
from theory.__main__ import main
from theory.claims import BY_ID
from theory.symbolic import (
    identities_for,
    is_amplified_by_residual,
    is_linear_in_curvature,
    output_layer_holds_no_curvature,
    uses_every_later_site,
)
from theory.symbolic.lookup import DEFINITIONS
from theory.symbolic.rct import flat_limit_slope, sharp_limit

WIDTHS = (2, 2, 2)
FAILS = {"E7", "E8", "E27", "E28", "E30", "E31", "E32", "E33"}


@pytest.mark.parametrize("number", range(1, 34))
def test_every_equation_has_its_check(number: int) -> None:
    """E[1]-E[33]: identities hold everywhere, or fail somewhere for the equations known to fail below the top
    two.
    """
    equation = f"E{number}"
    rows = identities_for(equation)
    assert rows
    assert all(row.holds for row in rows) == (equation not in FAILS)
    assert (BY_ID[equation].kind == "definition") == (equation in DEFINITIONS)
    if equation in DEFINITIONS:
        module, _, name = DEFINITIONS[equation].replace(".DeepNet.forward", ":DeepNet").rpartition(".")
        module, _, name = (module + "." + name).partition(":") if ":" in name else (module, "", name)
        assert hasattr(importlib.import_module(module), name)


def test_every_equation_number_stands_in_these_tests() -> None:
    """A reader who looks for E[n] under tests/theory finds it: as E[n], or inside a range E[a]-E[b]."""
    text = "".join(p.read_text() for p in Path(__file__).parent.glob("test_*.py") if p != Path(__file__))
    found = {int(n) for n in re.findall(r"E\[(\d+)\]", text)}
    for a, b in re.findall(r"E\[(\d+)\]-E\[(\d+)\]", text):
        found |= set(range(int(a), int(b) + 1))
    assert found >= set(range(1, 34))


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_linear_in_curvature_and_fed_by_every_later_layer(layer: int) -> None:
    """A.5 "linear dependence", A.4.4 "weighted sum": true of the exact form, site by site."""
    assert is_linear_in_curvature(WIDTHS, layer)
    assert uses_every_later_site(WIDTHS, layer)


def test_amplification_by_the_residual() -> None:
    """A.5: the σ'' part has the factor f - y, the Gauss-Newton part has neither; the output layer has no σ''."""
    assert is_amplified_by_residual(WIDTHS)
    assert output_layer_holds_no_curvature(WIDTHS)


@pytest.mark.parametrize("beta", [0, 1, 2])
def test_limits_in_alpha(beta: int) -> None:
    """Figure 1: α -> oo gives ReLU; α -> 0 gives slope 1/2 at every fixed x."""
    positive, negative = sharp_limit(beta)
    assert str(positive) == "p"
    assert negative == 0
    assert 2 * flat_limit_slope(beta) == 1


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["E27", "14"]) == 0
    out = capsys.readouterr().out
    assert "layer 1 of hidden widths (2, 2, 2): derived - displayed = W2_0_0" in out
    assert out.count("difference 0") >= 6
    assert main(["E34"]) == 2
    assert "no equation of the paper" in capsys.readouterr().err
    with pytest.raises(UnknownNameError):
        identities_for("E0")
