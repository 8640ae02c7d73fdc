"""Replicates become an unbiased squared norm, its error, and the decision to stop."""

from hessdiag.norm.estimates import STATUS, NormEstimate, enough
from hessdiag.norm.ratios import Ratio, cosine, ratio, share
from hessdiag.norm.replicates import Replicates
from hessdiag.norm.report import NormReport, TraceEstimate, course, estimate, exact_norm, plug_in_square, trace

__all__ = [
    "STATUS",
    "NormEstimate",
    "NormReport",
    "Ratio",
    "Replicates",
    "TraceEstimate",
    "cosine",
    "course",
    "enough",
    "estimate",
    "exact_norm",
    "plug_in_square",
    "ratio",
    "share",
    "trace",
]
