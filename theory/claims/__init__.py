"""Every claim of the paper, numbered, and the statements of docs/derivation.md.

What holds of each is computed by the check that bears its id.
"""

from theory.claims.derivation import DERIVATION
from theory.claims.empirical import EMPIRICAL
from theory.claims.equations import EQUATIONS
from theory.claims.mathematical import MATHEMATICAL
from theory.claims.model import IMPROVEMENTS, TABLE1, TABLE2, AccuracyRow, Claim, CostRow, Kind
from theory.claims.tables import TABLES

CLAIMS: tuple[Claim, ...] = (*EQUATIONS, *MATHEMATICAL, *TABLES, *EMPIRICAL, *DERIVATION)
"""All claims, and the statements of docs/derivation.md; ids are unique. `BY_ID[id]` finds one."""

BY_ID: dict[str, Claim] = {claim.id: claim for claim in CLAIMS}

__all__ = [
    "BY_ID",
    "CLAIMS",
    "DERIVATION",
    "EMPIRICAL",
    "EQUATIONS",
    "IMPROVEMENTS",
    "MATHEMATICAL",
    "TABLE1",
    "TABLE2",
    "TABLES",
    "AccuracyRow",
    "Claim",
    "CostRow",
    "Kind",
]
