"""How a measurement is run: plan, loop, audit, result."""

from hessdiag.measuring.audit import Audit
from hessdiag.measuring.comparisons import AuditEntry
from hessdiag.measuring.result import Measurement, NormSummary
from hessdiag.methods import Plan

__all__ = ["Audit", "AuditEntry", "Measurement", "NormSummary", "Plan"]
