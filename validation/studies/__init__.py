"""Measured sizes behind the verdicts: tables, figures, and what was compared."""

from validation.studies import (
    convolutions,
    dynamics,
    error_size,
    estimators,
    gauss_newton,
    oracles,
    parts,
    rescaling,
    stored,
)
from validation.studies.base import STUDIES, Study

__all__ = [
    "STUDIES",
    "Study",
    "convolutions",
    "dynamics",
    "error_size",
    "estimators",
    "gauss_newton",
    "oracles",
    "parts",
    "rescaling",
    "stored",
]
