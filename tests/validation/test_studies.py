"""Each study runs, its findings hold, and its picture is drawn from the stored table."""

from __future__ import annotations

import json
import xml.etree.ElementTree as xml

import pytest
import torch

from validation import ledger as ledgers
from validation.register import Run
from validation.report.page import draw
from validation.studies import STUDIES, error_size, estimators

torch.set_num_threads(1)
FAST = ("convolutions", "error_size", "rescaling", "stored")


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=[pytest.mark.slow, pytest.mark.statistical]) for n in STUDIES]
)
def test_findings_hold(name: str) -> None:
    """Quick runs. Statistical ones: each |z| < 4 (1 in 16,000 each) or 5, about 25 of them in all."""
    record = ledgers.run_study(name, Run(quick=True))
    assert "error" not in record, record.get("error")
    assert record["findings"] or record["rows"]
    assert [f["statement"] for f in record["findings"] if not f["holds"]] == []
    json.dumps(record, allow_nan=False)
    picture = draw(name, json.loads(json.dumps(record)))
    assert (picture is None) == (STUDIES[name].draw is None)
    if picture is not None:
        assert xml.fromstring(picture).tag.endswith("svg")


@pytest.mark.statistical
def test_variance_formulas_of_the_engine_s_estimators() -> None:
    """Hutchinson and propagation without direct shares, |z| < 4 on 300 draws each; a wrong formula is told apart."""
    c = estimators.case()
    functional = estimators._functional(c)
    draws = estimators.propagation_draws(c, 300)
    positive, negative = estimators.remote_weights(c)
    formula = float(estimators.propagation_estimate_variance(positive, negative).sum())
    squares = ((draws - functional) ** 2).sum(1)
    assert estimators.against("variance", squares, formula)[1].holds
    assert not estimators.against("variance", squares, 2 * formula)[1].holds
    assert estimators.against("mean", draws.sum(1), float(functional.sum()))[1].holds


def test_error_study_is_reproducible() -> None:
    one, two = (error_size.run(Run(quick=True)).rows for _ in range(2))
    assert one == two
