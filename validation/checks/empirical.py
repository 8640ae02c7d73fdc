"""Claims that rest on experiments: read from stored results, `results/verdicts.json`; without them "not tested".

The file is written by `python -m experiments figures`, a mapping claim id -> {verdict, evidence, figure, tier, ...}
with either `interval` [low, high] or `value`, `low`, `high`, and `settings`: setting -> {word, text, ...}. A claim
about the norm has further rows, "claim [adversarial]" and "claim [invariant]"; names that begin with "H." are
hypotheses of this project. Nothing else makes such a claim hold or fail.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hessdiag.errors import DataError
from hessdiag.store.files import BadFileError, read_json
from theory.claims import CLAIMS
from validation.evidence import Evidence, Figure, Report
from validation.register import Run, alike

COMMAND = "python -m experiments figures"


def path_of(run: Run) -> Path:
    """Where experiments leave their verdicts."""
    return run.results / "verdicts.json"


def read(run: Run) -> dict[str, dict[str, Any]]:
    """The stored verdicts, empty where there are none; refused where the file is no such mapping."""
    path = path_of(run)
    if not path.exists():
        return {}
    try:
        found = read_json(path)
    except BadFileError as error:
        raise DataError(f"{path}: no JSON ({error}); write it anew with {COMMAND}") from None
    if not isinstance(found, dict) or not all(isinstance(row, dict) and "verdict" in row for row in found.values()):
        raise DataError(f"{path}: not a mapping from claims to verdicts; write it anew with {COMMAND}")
    return found


def report(claim: str, run: Run) -> Report:
    """What the results say of a claim."""
    found = read(run)
    row = found.get(claim)
    source = str(path_of(run))
    if row is None:
        return Report("not tested", f"no results in {source}: {COMMAND}", source)
    rows = {name: other for name, other in found.items() if name == claim or name.startswith(f"{claim} [")}
    text = "; ".join(
        (f"{name.removeprefix(claim).strip()}: " if name != claim else "") + str(other.get("evidence") or "")
        for name, other in rows.items()
    )
    settings = {name: words_of(other) for name, other in rows.items()}
    return Report(row["verdict"], text, f"{source}: {claim}", _figure(row), settings)


def words_of(row: dict[str, Any]) -> dict[str, str]:
    """A row of the matrix: the word of every setting, with a star where it is exploratory."""
    cells = row.get("settings") or {}
    return {name: cell["word"] + "*" * (cell.get("status") == "exploratory") for name, cell in cells.items()}


def hypotheses(run: Run) -> dict[str, dict[str, Any]]:
    """The hypotheses beside the paper's claims: statement, verdict and words."""
    return {
        name: {"statement": row.get("statement") or "", "verdict": row["verdict"], "settings": words_of(row)}
        for name, row in read(run).items()
        if name.startswith("H.")
    }


def _figure(row: dict[str, Any]) -> Figure | None:
    low, high = row.get("interval") or (row.get("low"), row.get("high"))
    value = row.get("value")
    if value is None and low is None:
        return None
    value, low, high = (float("nan") if v is None else float(v) for v in (value, low, high))
    return Figure(str(row.get("figure") or "measured"), value, low, high, "confidence interval")


alike(
    {c.id: f"{c.where}: read from the results of experiments." for c in CLAIMS if c.kind == "empirical"},
    lambda claim, run: Evidence(claim, report=report(claim, run)),
    reads_results=True,
)
