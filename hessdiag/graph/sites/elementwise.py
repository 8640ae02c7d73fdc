"""A function of one tensor, entry by entry, h = sigma(z): c = sigma''(z) dl/dh on dz.

Which functions these are stands in `formulas` for torch's own nodes, and in `hessdiag.activations.functions` for custom
autograd Functions: this project's own and those that a user registered.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hessdiag.activations import max_curvature
from hessdiag.activations.admission import curve_of
from hessdiag.errors import UncoveredModelError
from hessdiag.graph import saved
from hessdiag.graph.nodes import short_name
from hessdiag.graph.sites.formulas import CURVED, PIECEWISE_LINEAR, Derivatives
from hessdiag.graph.sites.site import Pairs, Pointwise


def derivatives(node: Any) -> Derivatives:
    """(sigma'(z), sigma''(z) or None) of an elementwise node."""
    with torch.no_grad():
        curve = curve_of(node)
        try:
            if curve is not None:
                first, second = curve.derivatives(node)
                return first.detach(), second.detach()
            table = CURVED if node.name() in CURVED else PIECEWISE_LINEAR
            slope, bend = table[node.name()](node)
        except RuntimeError as error:
            if "inplace" not in str(error):
                raise
            raise UncoveredModelError(
                f"{node.name()}: what it saved for its derivative was overwritten in place: no gradient exists; "
                "use the out-of-place form of the operation after it"
            ) from error
        return slope.detach(), None if bend is None else bend.detach()


class Elementwise(Pointwise):
    """Activations and whatever else acts on single entries."""

    name = "elementwise"
    nodes = frozenset({*CURVED, *PIECEWISE_LINEAR})
    live_inputs = 1

    @classmethod
    def takes(cls, node: Any) -> bool:
        """One of torch's own by its name, or a custom Function whose derivatives are known."""
        return node.name() in cls.nodes or curve_of(node) is not None

    @classmethod
    def bends(cls, node: Any) -> bool:
        """False where it is piecewise linear."""
        return node.name() not in PIECEWISE_LINEAR

    @classmethod
    def second(cls, node: Any) -> Pairs:
        """sigma''(z)."""
        found = derivatives(node)[1]
        assert found is not None
        return {(0, 0): found}

    @classmethod
    def factor(cls, node: Any, slot: int) -> tuple[bool, Tensor | None]:
        """sigma'(z)."""
        return True, derivatives(node)[0]


def is_elementwise(node: Any) -> bool:
    """True where `derivatives` knows the node."""
    return Elementwise.takes(node)


_REGISTERED = {
    "SiluBackward0": "silu", "TanhBackward0": "tanh", "SigmoidBackward0": "sigmoid", "MishBackward0": "mish",
    "ReluBackward0": "relu", "LeakyReluBackward0": "leaky_relu", "LeakyReluBackward1": "leaky_relu",
}  # fmt: skip


def curvature_of(node: Any) -> tuple[str, float]:
    """(name, max|sigma''|) of the function behind an elementwise node; NaN where no closed bound is known."""
    name, label, number = node.name(), short_name(node).lower(), saved.number
    curve = curve_of(node)
    if curve is not None:
        return curve.label(node), curve.largest(node)
    if name in PIECEWISE_LINEAR:
        return label, math.inf
    if name in _REGISTERED:
        return _REGISTERED[name], max_curvature(_REGISTERED[name])
    if name == "SoftplusBackward0":
        return label, number(node, "beta") / 4
    if name == "GeluBackward0":
        return label, max_curvature("gelu" if saved.text(node, "approximate") == "none" else "gelu:approximate=tanh")
    if name in ("CeluBackward0", "CeluBackward1"):
        return label, 1.0 / number(node, "alpha")
    if name in ("EluBackward0", "EluBackward1"):
        scale, alpha, rate = (number(node, k) for k in ("scale", "alpha", "input_scale"))
        kinked = abs(alpha * rate - 1) > 1e-6
        return label, math.inf if kinked else abs(scale * alpha) * rate * rate
    return label, math.nan
