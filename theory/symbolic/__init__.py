"""The paper's mathematics in sympy: derived, proved, or refuted by subtraction. Needs neither torch nor the
engine.
"""

from theory.symbolic.deep import DeepNet, MissingPair, Subtraction, chain_rule_gap, subtract
from theory.symbolic.deep_identities import (
    LayerIdentity,
    expansion_identities,
)
from theory.symbolic.extrema import Extrema, Extremum, extrema
from theory.symbolic.insights import (
    is_amplified_by_residual,
    is_linear_in_curvature,
    output_layer_holds_no_curvature,
    uses_every_later_site,
)
from theory.symbolic.lookup import identities_for
from theory.symbolic.maxima import MaximumProof, maximum_at_zero
from theory.symbolic.rct import Identity, curvature_at_zero, rct, second_derivative
from theory.symbolic.table1 import Curvature, curvatures

__all__ = [
    "Curvature",
    "DeepNet",
    "Extrema",
    "Extremum",
    "Identity",
    "LayerIdentity",
    "MaximumProof",
    "MissingPair",
    "Subtraction",
    "chain_rule_gap",
    "curvature_at_zero",
    "curvatures",
    "expansion_identities",
    "extrema",
    "identities_for",
    "is_amplified_by_residual",
    "is_linear_in_curvature",
    "maximum_at_zero",
    "output_layer_holds_no_curvature",
    "rct",
    "second_derivative",
    "subtract",
    "uses_every_later_site",
]
