"""All claims with their evidence, made claim by claim and kept in one JSON file as they are finished.

A claim whose check, its code and its inputs are as they were is taken from the file; so an interrupted run goes on
where it stopped. Records are sealed: one that was changed by hand is made anew.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hessdiag.errors import HessdiagError, UnknownNameError, nearest
from hessdiag.store.files import BadFileError, read_json, write_bytes
from theory.claims import BY_ID, CLAIMS
from validation import state
from validation.checks import CHECKS
from validation.checks.empirical import hypotheses, path_of
from validation.evidence import VERDICTS
from validation.register import Run
from validation.studies import STUDIES
from validation.studies.stored import exports

SCHEMA = "hessdiag-ledger/1"
Record = dict[str, Any]
Progress = Callable[[str, int, int, bool], None]


@dataclass
class Ledger:
    """Records by claim and by study, in the paper's order, and what failed to run."""

    mode: str
    claims: dict[str, Record] = field(default_factory=dict)
    studies: dict[str, Record] = field(default_factory=dict)
    hypotheses: dict[str, Record] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        """How many claims have each verdict."""
        found = [record["verdict"] for record in self.claims.values()]
        return {verdict: found.count(verdict) for verdict in VERDICTS if verdict in found}

    @property
    def errors(self) -> list[str]:
        """Checks that raised, findings of studies that fail, and derivations without evidence."""
        wrong = [f"{name}: {record['error']}" for name, record in self.claims.items() if record.get("error")]
        for name, record in self.claims.items():
            wrong += [f"{name}: {surprise}" for surprise in record.get("surprises", [])]
            if record["kind"] != "empirical" and record["verdict"] == "not tested" and not record.get("error"):
                wrong.append(f"{name}: its check found nothing")
        for name, record in self.studies.items():
            if record.get("error"):
                wrong.append(f"study {name}: {record['error']}")
            wrong += [f"study {name}: {f['statement']}" for f in record.get("findings", []) if not f["holds"]]
        return wrong

    def to_dict(self) -> dict[str, Any]:
        """The document that `docs/ledger.md` describes."""
        return {
            "schema": SCHEMA,
            "paper": "arXiv 2603.23860",
            "mode": self.mode,
            "verdicts": self.counts(),
            "claims": self.claims,
            "hypotheses": self.hypotheses,
            "studies": self.studies,
        }


def load(path: Path) -> Ledger | None:
    """The ledger stored in a file, or None where there is none that can be read."""
    try:
        found = read_json(path)
    except BadFileError:
        return None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        return None
    return Ledger(
        str(found["mode"]), dict(found["claims"]), dict(found["studies"]), dict(found.get("hypotheses") or {})
    )


def save(ledger: Ledger, path: Path) -> None:
    """Write the ledger whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(ledger.to_dict(), ensure_ascii=False, indent=1, allow_nan=False)
    write_bytes(path, (text + "\n").encode())


def select(ids: Sequence[str]) -> list[str]:
    """Claim ids as given, `28` and `e28` meaning E28; an unknown one is refused with the nearest."""
    found = []
    folded = {name.lower(): name for name in BY_ID}
    for given in ids:
        name = folded.get(given.lower()) or folded.get(f"e{given.lower()}")
        if name is None:
            raise UnknownNameError(f"no claim {given!r}; {nearest(given, list(BY_ID))}")
        found.append(name)
    return found


def claim_key(claim: str, run: Run) -> str:
    """The key under which a claim's result is stored."""
    check = CHECKS[claim]
    path = path_of(run)
    inputs = path.read_bytes() if check.reads_results and path.exists() else b""
    return state.key(check.module, check.name, quick=run.quick, inputs=inputs)


def check_claim(claim: str, run: Run) -> Record:
    """Run the check of one claim; an exception becomes the record's error, and the claim stays not tested."""
    about = asdict(BY_ID[claim])
    record: Record = {"where": about["where"], "statement": about["statement"], "kind": about["kind"]}
    record["formula"] = about["formula"]
    begun = time.perf_counter()
    if claim not in CHECKS:
        record |= {"verdict": "not tested", "summary": "no check", "findings": [], "figures": [], "check": ""}
        return record | {"correction": "", "counterexample": "", "note": "", "key": "", "seconds": 0.0}
    check = CHECKS[claim]
    try:
        record |= check(run).to_dict()
    except (HessdiagError, ArithmeticError, AssertionError, ValueError, RuntimeError) as error:
        record |= {"verdict": "not tested", "summary": "the check failed to run", "findings": [], "figures": []}
        record |= {"correction": "", "counterexample": "", "note": "", "error": f"{type(error).__name__}: {error}"}
    record |= {"check": check.place, "key": claim_key(claim, run)}
    record["seconds"] = round(time.perf_counter() - begun, 3)
    record["seal"] = state.seal(record)
    return record


def run_study(name: str, run: Run) -> Record:
    """Run one study."""
    begun = time.perf_counter()
    registered = STUDIES[name]
    try:
        record: Record = registered.function(run).to_dict()
    except (HessdiagError, ArithmeticError, AssertionError, ValueError, RuntimeError) as error:
        record = {"title": name, "columns": [], "rows": [], "findings": [], "notes": []}
        record["error"] = f"{type(error).__name__}: {error}"
    record |= {"study": registered.module, "key": study_key(name, run)}
    record["seconds"] = round(time.perf_counter() - begun, 3)
    record["seal"] = state.seal(record)
    return record


def study_key(name: str, run: Run) -> str:
    """The key under which a study's result is stored."""
    registered = STUDIES[name]
    inputs = b"".join(path.read_bytes() for path in exports(run.results)) if registered.reads_results else b""
    return state.key(registered.module, name, quick=run.quick, inputs=inputs)


def usable(record: Record | None, key: str) -> bool:
    """Whether a stored record can stand: same key, unaltered, and no error in it."""
    if record is None or record.get("error") or not key:
        return False
    return record.get("key") == key and record.get("seal") == state.seal(record)


def build(
    run: Run,
    path: Path,
    *,
    fresh: bool = False,
    studies: bool = True,
    progress: Progress | None = None,
) -> Ledger:
    """Every claim and every study, stored as soon as it is finished; what is still valid is not made again."""
    old = None if fresh else load(path)
    ledger = Ledger("quick" if run.quick else "full", hypotheses=hypotheses(run))
    names = [("claim", claim.id) for claim in CLAIMS] + [("study", name) for name in STUDIES if studies]
    saved = time.monotonic()
    if old is not None:  # only what is still valid
        valid = {name for name in CHECKS if usable(old.claims.get(name), claim_key(name, run))}
        ledger.claims = {name: old.claims[name] for name in CHECKS if name in valid}
        valid = {name for name in STUDIES if usable(old.studies.get(name), study_key(name, run))}
        ledger.studies = {name: old.studies[name] for name in STUDIES if name in valid}
    for done, (kind, name) in enumerate(names):
        records = ledger.claims if kind == "claim" else ledger.studies
        kept = name in records
        if not kept:
            records[name] = check_claim(name, run) if kind == "claim" else run_study(name, run)
        if not kept and time.monotonic() - saved > 2.0:
            save(ledger, path)
            saved = time.monotonic()
        if progress is not None:
            progress(name, done + 1, len(names), kept)
    ledger.claims = {claim.id: ledger.claims[claim.id] for claim in CLAIMS}
    ledger.studies = {name: ledger.studies[name] for name in STUDIES if name in ledger.studies}
    save(ledger, path)
    return ledger
