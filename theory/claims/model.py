"""What a claim is, and the numbers the paper prints in its tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from theory._refusals import refuse

Kind = Literal["definition", "derivation", "arithmetic", "empirical", "theorem"]


@dataclass(frozen=True)
class Claim:
    """One statement of the paper (arXiv 2603.23860), or of docs/derivation.md. It carries no verdict: a check
    bearing its id computes that, from `formula` where there is one.

    definition: fixes a symbol; derivation: follows, or does not, from mathematics alone; arithmetic: numbers
    printed in one place against numbers printed in another; empirical: rests on experiments; theorem: ours,
    stated and proved in docs/derivation.md.
    """

    id: str
    where: str
    statement: str
    kind: Kind
    formula: str = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            refuse(f"claim {self.id}: kind {self.kind!r} is unknown; known: {', '.join(get_args(Kind))}")
        if not (self.id and self.where and self.statement) or " " in self.id:
            refuse(f"claim {self.id!r} needs an id without spaces, a place and a statement")


@dataclass(frozen=True)
class AccuracyRow:
    """A row of Table 1: accuracies in percent, max|σ''| as printed (infinity for a kink)."""

    key: str
    name: str
    standard: float
    robust: float
    curvature: float


@dataclass(frozen=True)
class CostRow:
    """A row of Table 2: GPU memory in GB, minutes for 20 epochs."""

    key: str
    name: str
    memory: float
    minutes: float


TABLE1 = (
    AccuracyRow("relu", "ReLU", 85.23, 51.37, float("inf")),
    AccuracyRow("leaky_relu", "Leaky ReLU", 84.52, 51.24, float("inf")),
    AccuracyRow("elu", "ELU", 78.39, 43.11, 1.0),
    AccuracyRow("gelu", "GELU", 84.88, 51.69, 0.798),
    AccuracyRow("swish", "Swish", 82.53, 48.08, 0.5),
    AccuracyRow("mish", "Mish", 82.63, 48.75, 0.362),
    AccuracyRow("rct0", "RCT-AF (β=0)", 86.65, 54.57, 7.0),
    AccuracyRow("rct1", "RCT-AF (β=1)", 87.24, 54.79, 7.0),
    AccuracyRow("rct2", "RCT-AF (β=2)", 86.08, 54.49, 7.0),
)
"""Table 1: DAJAT, CIFAR-10, ResNet-18, AutoAttack."""

TABLE2 = (
    CostRow("relu", "ReLU", 0.73, 5.88),
    CostRow("leaky_relu", "LeakyReLU", 0.73, 5.92),
    CostRow("elu", "ELU", 0.73, 5.83),
    CostRow("selu", "SELU", 0.73, 5.88),
    CostRow("gelu", "GELU", 0.99, 7.92),
    CostRow("mish", "Mish", 1.25, 6.98),
    CostRow("softplus", "Softplus", 0.99, 5.87),
    CostRow("swish", "Swish", 0.99, 5.88),
    CostRow("rct0", "RCT-AF (β=0)", 0.99, 6.30),
    CostRow("rct1", "RCT-AF (β=1)", 1.25, 6.93),
    CostRow("rct2", "RCT-AF (β=2)", 2.30, 8.86),
)
"""Table 2: ResNet-18, CIFAR-10, batch 128, 20 epochs of standard training, 2080 Ti."""

RANGE = (4, 10)
"""The range of max|σ''| in which the paper finds robustness largest."""

SWEPT, COMPARED = 50, 15
"""Section 4.1 and figure 3: the largest α, said to reach as large a max|σ''|, and up to where three β are compared."""

IMPROVEMENTS = {"rct0": 2.88, "rct1": 3.1, "rct2": 2.8}
"""Section 4.4: robust accuracy over GELU's 51.69, in points."""
