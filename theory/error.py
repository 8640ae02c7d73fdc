"""How far the paper's D is from the truth, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from theory.net import Net
from theory.path_expansion import exact_recursion, paper_recursion


@dataclass(frozen=True)
class LayerError:
    """Relative error ‖D_paper - D‖/‖D‖ of layer l (all samples and neurons), at distance L - l from the
    output.
    """

    layer: int
    distance: int
    relative: float
    exact_norm: float


def error_by_layer(net: Net, x: Tensor, *, cotangent: Tensor | None = None) -> tuple[LayerError, ...]:
    """`LayerError` for l = 1..L-1; zero to rounding where L - l <= 2. A layer with D = 0 has error 0 or
    infinity.
    """
    exact = exact_recursion(net, x, cotangent=cotangent)
    paper = paper_recursion(net, x, cotangent=cotangent)
    rows = []
    for l, (a, b) in enumerate(zip(exact.values, paper.values), 1):
        norm, gap = float(a.norm()), float((a - b).norm())
        relative = gap / norm if norm > 0 else (0.0 if gap == 0 else float("inf"))
        rows.append(LayerError(l, net.depth - l, relative, norm))
    return tuple(rows)
