"""The numbers that the paper (arXiv 2603.23860) prints in its tables, to stand beside ours."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf


@dataclass(frozen=True)
class Printed:
    """One activation: key in the claims, our spelling, name, the cells of Tables 1 and 2 (None where absent)."""

    key: str
    activation: str
    name: str
    standard: float | None
    robust: float | None
    curvature: float | None
    memory: float
    minutes: float


PRINTED = (
    Printed("relu", "relu", "ReLU", 85.23, 51.37, inf, 0.73, 5.88),
    Printed("leaky_relu", "leaky_relu", "Leaky ReLU", 84.52, 51.24, inf, 0.73, 5.92),
    Printed("elu", "elu", "ELU", 78.39, 43.11, 1.0, 0.73, 5.83),
    Printed("selu", "selu", "SELU", None, None, None, 0.73, 5.88),
    Printed("gelu", "gelu", "GELU", 84.88, 51.69, 0.798, 0.99, 7.92),
    Printed("swish", "silu", "Swish", 82.53, 48.08, 0.5, 0.99, 5.88),
    Printed("mish", "mish", "Mish", 82.63, 48.75, 0.362, 1.25, 6.98),
    Printed("softplus", "softplus", "Softplus", None, None, None, 0.99, 5.87),
    Printed("rct0", "rct:beta=0,alpha=28", "RCT-AF (β=0)", 86.65, 54.57, 7.0, 0.99, 6.30),
    Printed("rct1", "rct:beta=1,alpha=14", "RCT-AF (β=1)", 87.24, 54.79, 7.0, 1.25, 6.93),
    Printed("rct2", "rct:beta=2,alpha=7", "RCT-AF (β=2)", 86.08, 54.49, 7.0, 2.30, 8.86),
)
"""Table 1: DAJAT, CIFAR-10, ResNet-18, AutoAttack at 8/255. Table 2: standard training, 20 epochs, a 2080 Ti."""

BY_ACTIVATION = {row.activation: row for row in PRINTED}
EXACT_CURVATURE = {"mish": 0.6442}
"""Where the printed max|σ''| is not the supremum: Mish reaches 0.6442 at x = -0.0879."""
