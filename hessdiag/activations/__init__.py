"""Activations: the RCT-AF family, a registry of names, and the largest curvature of any of them."""

from hessdiag.activations.largest import curvature, max_curvature
from hessdiag.activations.module import RCTAF, alpha_for
from hessdiag.activations.rct import MAX_BETA, RCTFunction, rct, rct_d1, rct_d2
from hessdiag.activations.registration import register_activation
from hessdiag.activations.registry import ALIASES, REGISTRY, Entry, Spec, build, describe, factory, spec_of
from hessdiag.activations.supremum import Curvature

__all__ = [
    "ALIASES",
    "MAX_BETA",
    "RCTAF",
    "REGISTRY",
    "Curvature",
    "Entry",
    "RCTFunction",
    "Spec",
    "alpha_for",
    "build",
    "curvature",
    "describe",
    "factory",
    "max_curvature",
    "rct",
    "rct_d1",
    "rct_d2",
    "register_activation",
    "spec_of",
]
