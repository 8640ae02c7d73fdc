"""The elementwise nodes of a graph: which they are, their derivatives, and how curved their function is at most."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..activations import RCTAF, RCTFunction, max_curvature, rct_d1, rct_d2
from ..errors import UncoveredModelError
from .formulas import CURVED, PIECEWISE_LINEAR, Derivatives


def is_rct(node: Any) -> bool:
    """True for the node of this project's own activation, the only custom autograd Function that is covered."""
    return getattr(node, "_forward_cls", None) is RCTFunction


def is_elementwise(node: Any) -> bool:
    """True where `derivatives` knows the node."""
    return node.name() in CURVED or node.name() in PIECEWISE_LINEAR or is_rct(node)


def is_curved(node: Any) -> bool:
    """True where the node is elementwise with a second derivative that need not vanish."""
    return node.name() in CURVED or is_rct(node)


def derivatives(node: Any) -> Derivatives:
    """(sigma'(z), sigma''(z) or None) of an elementwise node."""
    with torch.no_grad():
        if is_rct(node):
            (x,) = node.saved_tensors
            return rct_d1(x, node.alpha, node.beta), rct_d2(x, node.alpha, node.beta)
        table = CURVED if node.name() in CURVED else PIECEWISE_LINEAR
        try:
            first, second = table[node.name()](node)
        except RuntimeError as error:
            if "inplace" not in str(error):
                raise
            raise UncoveredModelError(
                f"{node.name()}: what it saved for its derivative was overwritten in place: no gradient exists; "
                "use the out-of-place form of the operation after it"
            ) from error
        return first.detach(), None if second is None else second.detach()


_REGISTERED = {
    "SiluBackward0": "silu", "TanhBackward0": "tanh", "SigmoidBackward0": "sigmoid", "MishBackward0": "mish",
    "ReluBackward0": "relu", "LeakyReluBackward0": "leaky_relu", "LeakyReluBackward1": "leaky_relu",
}  # fmt: skip


def curvature_of(node: Any) -> tuple[str, float]:
    """(name, max|sigma''|) of the function behind an elementwise node; NaN where no closed bound is known."""
    name = node.name()
    label = name.removesuffix("0").removesuffix("1").removesuffix("Backward").lower()
    if is_rct(node):
        return f"rct:beta={node.beta},alpha={node.alpha:g}", RCTAF(alpha=node.alpha, beta=node.beta).max_curvature
    if name in PIECEWISE_LINEAR:
        return label, math.inf
    if name in _REGISTERED:
        return _REGISTERED[name], max_curvature(_REGISTERED[name])
    if name == "SoftplusBackward0":
        return label, float(node._saved_beta) / 4
    if name == "GeluBackward0":
        return label, max_curvature("gelu" if node._saved_approximate == "none" else "gelu:approximate=tanh")
    if name in ("CeluBackward0", "CeluBackward1"):
        return label, 1.0 / float(node._saved_alpha)
    if name in ("EluBackward0", "EluBackward1"):
        scale, alpha, rate = (float(getattr(node, f"_saved_{k}")) for k in ("scale", "alpha", "input_scale"))
        kinked = abs(alpha * rate - 1) > 1e-6
        return label, math.inf if kinked else abs(scale * alpha) * rate * rate
    return label, math.nan
