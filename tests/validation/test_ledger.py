"""The ledger: every claim has a check, results are kept and resumed, experiments are read, the page stands alone."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from hessdiag.errors import DataError, UnknownNameError
from theory.claims import BY_ID, CLAIMS
from validation import ledger as ledgers
from validation import state
from validation.__main__ import main
from validation.checks import CHECKS
from validation.register import Run, slug
from validation.report.formulas import svg
from validation.report.page import page
from validation.studies import STUDIES

QUICK = Run(quick=True, results=Path("no such folder"))
REFUTED = {"E7", "E8", "E27", "E28", "E30", "E31", "E32", "E33", "T1.mish.curvature", "F3.range", "F3.b0-beyond-15"}
REFUTED |= {"F6.text-and-caption", "S4.2.limits-expressivity"}
CONDITIONS = {"A5.linear", "S3.1.independent-control", "S4.5.near-linear", "S4.4.smooth-at-most-1"}
INSTANCES = {f"E{n}" for n in (9, *range(11, 19), 20, 22, 23, 24, 26, 29)}
INSTANCES |= {"S3.2.contributes", "A3.2.output-free", "A4.2.ck-independent", "A4.4.weighted-sum", "A5.amplification"}
INSTANCES |= {"S2.4.avoids-cancellation"}
INSTANCES |= {f"D.{name}" for name in ("recursion", "entry", "sites", "pairs", "gap", "scope", "infimum")}
MEASURED = {"D.start", "D.input-curvature"}
KINDS = {"definition": "as defined", "arithmetic": "consistent in print"}


def expected_verdict(claim: str) -> str:
    if claim in REFUTED:
        return "refuted"
    if claim in CONDITIONS:
        return "holds under conditions"
    if claim in MEASURED:
        return "holds numerically"
    return KINDS.get(BY_ID[claim].kind) or ("verified exactly" if claim in INSTANCES else "proved")


def test_every_claim_has_a_check_of_its_name() -> None:
    """Without a check a claim would say "not tested"; no claim of mathematics or arithmetic may."""
    assert [claim.id for claim in CLAIMS if claim.id not in CHECKS] == []
    for name, found in CHECKS.items():
        assert found.name == f"check_{slug(name)}"
        assert found.function.__doc__
        assert found.reads_results == (BY_ID[name].kind == "empirical")
    for n in range(1, 34):
        assert f"E[{n}]" in (CHECKS[f"E{n}"].function.__doc__ or "")


@pytest.mark.parametrize("claim", [c.id for c in CLAIMS if c.kind != "empirical"])
def test_verdicts_of_derivations(claim: str) -> None:
    """Every one is decided; what is refuted names a counterexample and what holds instead."""
    record = ledgers.check_claim(claim, QUICK)
    assert "error" not in record
    assert record["verdict"] == expected_verdict(claim)
    assert record["surprises"] == []
    assert bool(record["reach"]) == (record["verdict"] == "verified exactly")
    if record["verdict"] == "refuted":
        assert record["counterexample"]
        assert record["correction"]


def test_the_readme_counts_what_the_checks_find() -> None:
    """Each number of the README's sentence, from the verdicts that the tests above hold the checks to."""
    text = " ".join((Path(__file__).parents[2] / "README.md").read_text().split())
    found = Counter(expected_verdict(c.id) for c in CLAIMS if c.kind not in ("empirical", "theorem"))
    assert f"Of the {sum(found.values())} claims" in text
    for words, verdict in (
        ("are proved", "proved"),
        ("verified exactly", "verified exactly"),
        ("definitions are carried out as defined", "as defined"),
        ("are consistent in print", "consistent in print"),
        ("hold under conditions", "holds under conditions"),
        ("are refuted", "refuted"),
    ):
        assert f"{found[verdict]} {words}" in text, verdict


def test_experiments_without_results_are_not_tested(tmp_path: Path) -> None:
    run = Run(quick=True, results=tmp_path)
    for claim in CLAIMS:
        if claim.kind == "empirical":
            assert ledgers.check_claim(claim.id, run)["verdict"] == "not tested"


def test_experiments_are_read_from_results(tmp_path: Path) -> None:
    run = Run(quick=True, results=tmp_path)
    rows = {
        "F7a.u-shape": {
            "verdict": "does not transfer",
            "evidence": "no U",
            "interval": [1.0, 2.0],
            "value": 1.5,
            "settings": {"smoke/figure7": {"word": "does not transfer", "status": "exploratory"}},
        },
        "F7a.u-shape [adversarial]": {
            "verdict": "inconclusive",
            "evidence": "who knows",
            "settings": {"smoke/figure7": {"word": "inconclusive", "status": "confirmatory"}},
        },
        "S4.2.peak-in-4-10": {
            "verdict": "transfers",
            "evidence": "e",
            "value": 6.0,
            "low": 5.0,
            "high": None,
        },
        "F4.wider-is-higher": {"verdict": "proved", "evidence": "typed in"},
        "E28": {"verdict": "holds numerically", "evidence": "typed in"},
    }
    (tmp_path / "verdicts.json").write_text(json.dumps(rows))
    found = ledgers.check_claim("F7a.u-shape", run)
    assert found["verdict"] == "does not transfer"
    assert found["summary"] == "no U; [adversarial]: who knows"
    assert found["settings"] == {
        "F7a.u-shape": {"smoke/figure7": "does not transfer*"},
        "F7a.u-shape [adversarial]": {"smoke/figure7": "inconclusive"},
    }
    assert (found["figures"][0]["low"], found["figures"][0]["high"]) == (1.0, 2.0)
    assert ledgers.check_claim("S4.2.peak-in-4-10", run)["figures"][0]["high"] is None
    assert "no verdict that experiments give" in ledgers.check_claim("F4.wider-is-higher", run)["error"]
    assert ledgers.check_claim("E28", run)["verdict"] == "refuted"  # a derivation is not for experiments to decide
    (tmp_path / "verdicts.json").write_text("[]")
    with pytest.raises(DataError, match="not a mapping"):
        CHECKS["F7a.u-shape"](run)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = tuple(BY_ID[name] for name in ("E1", "E2", "F3.range", "F7a.u-shape"))
    monkeypatch.setattr(ledgers, "CLAIMS", chosen)
    monkeypatch.setattr(ledgers, "STUDIES", {})


def names_made(run: Run, path: Path, **options: bool) -> list[str]:
    made: list[str] = []
    ledgers.build(run, path, progress=lambda name, _d, _t, kept: None if kept else made.append(name), **options)
    return made


@pytest.mark.usefixtures("few")
def test_finished_claims_are_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, run = tmp_path / "ledger.json", Run(quick=True, results=tmp_path)
    assert names_made(run, path) == ["E1", "E2", "F3.range", "F7a.u-shape"]
    assert names_made(run, path) == []
    assert names_made(run, path, fresh=True) == ["E1", "E2", "F3.range", "F7a.u-shape"]
    stored = json.loads(path.read_text())
    del stored["claims"]["E2"]  # as if interrupted before E2
    stored["claims"]["F3.range"]["verdict"] = "proved"  # typed in by hand
    path.write_text(json.dumps(stored))
    assert names_made(run, path) == ["E2", "F3.range"]
    assert json.loads(path.read_text())["claims"]["F3.range"]["verdict"] == "refuted"
    (tmp_path / "verdicts.json").write_text(json.dumps({"F7a.u-shape": {"verdict": "holds"}}))
    assert names_made(run, path) == ["F7a.u-shape"]  # its input changed
    original = state._digest
    monkeypatch.setattr(state, "_digest", lambda m: "changed" if m == "theory.symbolic.rct" else original(m))
    assert set(names_made(run, path)) >= {"E1", "E2"}  # the code below changed
    path.write_text("{ broken")
    assert len(names_made(run, path)) == 4


@pytest.mark.usefixtures("few")
def test_a_check_that_raises_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_run: Run) -> None:
        raise ValueError("out of order")

    from dataclasses import replace

    monkeypatch.setitem(CHECKS, "E2", replace(CHECKS["E2"], function=broken))  # type: ignore[arg-type]
    found = ledgers.build(Run(quick=True, results=tmp_path), tmp_path / "ledger.json")
    assert found.claims["E2"]["verdict"] == "not tested"
    assert found.errors == ["E2: ValueError: out of order"]
    assert names_made(Run(quick=True, results=tmp_path), tmp_path / "ledger.json") == ["E2"]  # an error is not kept


@pytest.mark.usefixtures("few")
def test_schema_and_page(tmp_path: Path) -> None:
    """Strict JSON; a page that loads nothing."""
    found = ledgers.build(Run(quick=True, results=tmp_path), tmp_path / "ledger.json")
    text = (tmp_path / "ledger.json").read_text()
    document = json.loads(text, parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))
    assert document["schema"] == "hessdiag-ledger/1"
    assert set(document["claims"]["E2"]) >= {"verdict", "findings", "formula", "check", "key", "seal", "correction"}
    html = page(found)
    assert "<script" not in html
    assert "<link" not in html
    assert not re.findall(r'(?:src|href)=["\'](?!#|data:|https://arxiv\.org/abs/)', html)
    assert html.count("<article") == 4
    assert 'aria-label="' in html


@pytest.mark.usefixtures("few")
def test_the_page_shows_claims_by_settings(tmp_path: Path) -> None:
    """Every setting that says something is a column, every claim and hypothesis a row; what says nothing is empty."""

    def row(word: str, **more: str) -> dict[str, object]:
        cells = {"smoke/figure7": {"word": word, "status": "exploratory"}, "quick/figure7": {"word": "not tested"}}
        return {"verdict": word, "evidence": "e", "settings": cells, **more}

    rows = {"F7a.u-shape": row("transfers"), "F7a.u-shape [invariant]": row("inconclusive")}
    rows["H.trades-u"] = row("does not transfer", statement="A U.")
    (tmp_path / "verdicts.json").write_text(json.dumps(rows))
    found = ledgers.build(Run(quick=True, results=tmp_path), tmp_path / "ledger.json")
    html = page(found)
    assert "<th>smoke/figure7</th></tr>" in html
    for part in ("F7a.u-shape [invariant]", "transfers*", "inconclusive*", "does not transfer*", "H.trades-u: A U."):
        assert part in html
    assert ledgers.load(tmp_path / "ledger.json").hypotheses == found.hypotheses  # type: ignore[union-attr]


@pytest.mark.parametrize("claim", [c.id for c in CLAIMS if c.formula])
def test_every_formula_can_be_set(claim: str) -> None:
    drawn = svg(BY_ID[claim].formula)
    assert drawn.startswith("<svg")
    assert "nan" not in drawn


def test_closure_holds_what_a_check_rests_on() -> None:
    found = state.closure("validation.checks.deep")
    assert {
        "theory.symbolic.deep",
        "theory.path_expansion",
        "hessdiag.kernels.exact_batch",
        "validation.evidence",
    } <= set(found)
    assert "validation.report.page" not in found


def test_from_an_equation_number_to_its_check(capsys: pytest.CaptureFixture[str]) -> None:
    """One step: statement, formula, verdict, evidence, and where the check stands."""
    assert main(["--quick", "--claim", "28"]) == 0
    text = capsys.readouterr().out
    for part in ("E28", "equation 28, section A.4.3", "verdict: refuted", "counterexample", "check_E28", r"D^{(l)}_i="):
        assert part in text
    assert main(["--claim", "E99"]) == 2
    assert "no claim 'E99'" in capsys.readouterr().err
    assert ledgers.select(["e7", "33", "f7A.U-shape"]) == ["E7", "E33", "F7a.u-shape"]
    with pytest.raises(UnknownNameError):
        ledgers.select(["nothing"])


def test_studies_are_registered() -> None:
    assert set(STUDIES) == {
        "convolutions",
        "dynamics",
        "error_size",
        "estimators",
        "gauss_newton",
        "oracles",
        "parts",
        "rescaling",
        "stored",
    }
