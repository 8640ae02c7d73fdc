"""Custom autograd Functions that are elementwise: what a node of one says of its derivatives.

Those known by name; others are put to a test (`hessdiag.activations.admission`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hessdiag.activations.module import RCTAF
from hessdiag.activations.rct import RCTFunction, rct_d1, rct_d2


@dataclass(frozen=True)
class Curve:
    """The function behind a node, as told by the node itself."""

    derivatives: Callable[[Any], tuple[Tensor, Tensor]]
    """(sigma', sigma'') at the node's input."""
    label: Callable[[Any], str]
    largest: Callable[[Any], float]
    """sup |sigma''|."""
    serves: Callable[[Any], bool] = lambda node: True
    """False for nodes of the Function that are something else, such as a derivative of it."""


def _rct(node: Any) -> tuple[Tensor, Tensor]:
    (x,) = node.saved_tensors
    return rct_d1(x, node.alpha, node.beta), rct_d2(x, node.alpha, node.beta)


CURVES: dict[type | None, Curve] = {
    RCTFunction: Curve(
        _rct,
        lambda node: f"rct:beta={node.beta},alpha={node.alpha:g}",
        lambda node: RCTAF(alpha=node.alpha, beta=node.beta).max_curvature,
        lambda node: node.order == 0,
    )
}
