"""How a measurement is run: plan, loop, audit, result."""

from .audit import Audit
from .comparisons import AuditEntry
from .plan import Plan
from .result import Measurement, NormSummary

__all__ = ["Audit", "AuditEntry", "Measurement", "NormSummary", "Plan"]
