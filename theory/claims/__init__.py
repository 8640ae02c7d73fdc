"""Every claim of the paper, numbered; what holds of each is computed by the check that bears its id."""

from theory.claims.empirical import EMPIRICAL
from theory.claims.equations import EQUATIONS
from theory.claims.mathematical import MATHEMATICAL
from theory.claims.model import IMPROVEMENTS, TABLE1, TABLE2, AccuracyRow, Claim, CostRow, Kind
from theory.claims.tables import TABLES

CLAIMS: tuple[Claim, ...] = (*EQUATIONS, *MATHEMATICAL, *TABLES, *EMPIRICAL)
"""All claims; ids are unique. `BY_ID[id]` finds one."""

BY_ID: dict[str, Claim] = {claim.id: claim for claim in CLAIMS}

__all__ = [
    "BY_ID",
    "CLAIMS",
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
