"""Measured sizes behind the verdicts: tables, figures, and what was compared."""

from validation.studies.base import STUDIES, Study

__all__ = ["STUDIES", "Study"]
