"""How a measurement is run: plan, loop, audit, result."""

from ..methods import Plan
from .audit import Audit
from .comparisons import AuditEntry
from .result import Measurement, NormSummary

__all__ = ["Audit", "AuditEntry", "Measurement", "NormSummary", "Plan"]
