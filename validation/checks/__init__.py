"""One check per claim, by the claim's id."""

from validation.checks import deep, derivation, empirical, extrema, family, insights, shallow, tables
from validation.register import CHECKS

__all__ = ["CHECKS", "deep", "derivation", "empirical", "extrema", "family", "insights", "shallow", "tables"]
