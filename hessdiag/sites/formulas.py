"""First and second derivatives of elementwise autograd nodes, from what the node saved for backward.

Each entry maps a node of the autograd graph to (sigma'(z), sigma''(z)), closed forms in the node's own dtype; None
for sigma'' where the function is piecewise linear (the almost-everywhere derivative is meant at kinks). In-place
variants save their *result*; both forms are listed, since the recorded z is gone by then.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Derivatives = tuple[Tensor, Tensor | None]


def _sigmoid(node: Any) -> Derivatives:
    s = node._saved_result
    slope = s * (1 - s)
    return slope, slope * (1 - 2 * s)


def _tanh(node: Any) -> Derivatives:
    t = node._saved_result
    slope = 1 - t * t
    return slope, -2 * t * slope


def _silu(node: Any) -> Derivatives:
    x = node._saved_self
    s, c = torch.sigmoid(x), torch.sigmoid(-x)
    return s * (1 + x * c), s * c * (2 + x * (c - s))


def _gelu(node: Any) -> Derivatives:
    x = node._saved_self
    if node._saved_approximate == "none":
        density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        return 0.5 * torch.erfc(-x / math.sqrt(2)) + x * density, density * (2 - x * x)
    a, k = 0.044715, math.sqrt(2 / math.pi)
    inner1, inner2 = k * (1 + 3 * a * x * x), 6 * k * a * x
    t = torch.tanh(k * (x + a * x**3))
    t1 = (1 - t * t) * inner1
    t2 = (1 - t * t) * inner2 - 2 * t * t1 * inner1
    return 0.5 * (1 + t) + 0.5 * x * t1, t1 + 0.5 * x * t2


def _softplus(node: Any) -> Derivatives:
    x, beta, threshold = node._saved_self, float(node._saved_beta), float(node._saved_threshold)
    s, c = torch.sigmoid(beta * x), torch.sigmoid(-beta * x)
    linear = beta * x > threshold
    return torch.where(linear, 1.0, s), torch.where(linear, 0.0, beta * s * c)


def _mish(node: Any) -> Derivatives:
    x = node._saved_self
    s, c = torch.sigmoid(x), torch.sigmoid(-x)
    t = torch.tanh(F.softplus(x))
    r = 1 - t * t
    t1 = r * s
    return t + x * t1, 2 * t1 + x * (r * s * c - 2 * t * r * s * s)


def _elu_parts(node: Any, curved: Tensor, z: Tensor) -> Derivatives:
    """`curved` is alpha exp(rate z) below 0, z anything of its sign. At 0 torch takes sigma' from the left and
    sigma'' from the right.
    """
    scale, rate = float(node._saved_scale), float(node._saved_input_scale)
    return torch.where(z <= 0, curved * rate, scale), torch.where(z < 0, curved * rate * rate, 0.0)


def _elu(node: Any) -> Derivatives:
    x = node._saved_self
    rate = float(node._saved_input_scale)
    curved = float(node._saved_scale) * float(node._saved_alpha) * torch.exp(rate * x.clamp(max=0))
    return _elu_parts(node, curved, x)


def _elu_result(node: Any) -> Derivatives:
    r = node._saved_result
    return _elu_parts(node, r + float(node._saved_scale) * float(node._saved_alpha), r)


def _celu_parts(alpha: float, slope: Tensor, z: Tensor) -> Derivatives:
    return torch.where(z <= 0, slope, 1.0), torch.where(z < 0, slope / alpha, 0.0)


def _celu(node: Any) -> Derivatives:
    x, alpha = node._saved_self, float(node._saved_alpha)
    return _celu_parts(alpha, torch.exp(x.clamp(max=0) / alpha), x)


def _celu_result(node: Any) -> Derivatives:
    r, alpha = node._saved_result, float(node._saved_alpha)
    return _celu_parts(alpha, r / alpha + 1, r)


def _log_sigmoid(node: Any) -> Derivatives:
    x = node._saved_self
    c = torch.sigmoid(-x)
    return c, -c * torch.sigmoid(x)


def _hardswish(node: Any) -> Derivatives:
    x = node._saved_self
    inside = x.abs() < 3
    return torch.where(inside, (2 * x + 3) / 6, (x > 0).to(x)), inside.to(x) / 3


def _pow(node: Any) -> Derivatives:
    x, n = node._saved_self, float(node._saved_exponent)
    first = n * x.pow(n - 1) if n != 0 else torch.zeros_like(x)
    second = n * (n - 1) * x.pow(n - 2) if n not in (0.0, 1.0) else torch.zeros_like(x)
    return first, second


def _of_self(first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> Callable[[Any], Derivatives]:
    return lambda node: (first(node._saved_self), second(node._saved_self))


def _of_result(first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> Callable[[Any], Derivatives]:
    return lambda node: (first(node._saved_result), second(node._saved_result))


def _relu(node: Any) -> Derivatives:
    r = node._saved_result
    return (r > 0).to(r), None


def _leaky(saved: str) -> Callable[[Any], Derivatives]:
    def derivatives(node: Any) -> Derivatives:
        x = getattr(node, saved)
        return torch.where(x > 0, torch.ones_like(x), float(node._saved_negative_slope)), None

    return derivatives


def _inside(low: str, high: str, *, ends: bool = True, saved: str = "_saved_self") -> Callable[[Any], Derivatives]:
    """1 between two bounds, and on them if `ends`: torch's slope is 1 there for clamp, 0 for Hardtanh and ReLU6."""

    def derivatives(node: Any) -> Derivatives:
        x = getattr(node, saved)
        keep = torch.ones_like(x, dtype=torch.bool)
        for name, compare in ((low, torch.ge if ends else torch.gt), (high, torch.le if ends else torch.lt)):
            bound = getattr(node, name, None) if name else None
            if bound is not None:
                keep &= compare(x, float(bound))
        return keep.to(x), None

    return derivatives


def _abs(node: Any) -> Derivatives:
    return torch.sign(node._saved_self), None


_ROOT_PI = math.sqrt(math.pi)

CURVED: dict[str, Callable[[Any], Derivatives]] = {
    "SigmoidBackward0": _sigmoid,
    "TanhBackward0": _tanh,
    "SiluBackward0": _silu,
    "GeluBackward0": _gelu,
    "SoftplusBackward0": _softplus,
    "MishBackward0": _mish,
    "EluBackward0": _elu,
    "EluBackward1": _elu_result,
    "CeluBackward0": _celu,
    "CeluBackward1": _celu_result,
    "LogSigmoidBackward0": _log_sigmoid,
    "HardswishBackward0": _hardswish,
    "PowBackward0": _pow,
    "ExpBackward0": _of_result(lambda r: r, lambda r: r),
    "Expm1Backward0": _of_result(lambda r: r + 1, lambda r: r + 1),
    "SqrtBackward0": _of_result(lambda r: 0.5 / r, lambda r: -0.25 / r**3),
    "RsqrtBackward0": _of_result(lambda r: -0.5 * r**3, lambda r: 0.75 * r**5),
    "ReciprocalBackward0": _of_result(lambda r: -(r**2), lambda r: 2 * r**3),
    "LogBackward0": _of_self(lambda x: 1 / x, lambda x: -1 / x**2),
    "Log1PBackward0": _of_self(lambda x: 1 / (1 + x), lambda x: -1 / (1 + x) ** 2),
    "SinBackward0": _of_self(torch.cos, lambda x: -torch.sin(x)),
    "CosBackward0": _of_self(lambda x: -torch.sin(x), lambda x: -torch.cos(x)),
    "AtanBackward0": _of_self(lambda x: 1 / (1 + x * x), lambda x: -2 * x / (1 + x * x) ** 2),
    "ErfBackward0": _of_self(
        lambda x: 2 / _ROOT_PI * torch.exp(-x * x), lambda x: -4 / _ROOT_PI * x * torch.exp(-x * x)
    ),
}

PIECEWISE_LINEAR: dict[str, Callable[[Any], Derivatives]] = {
    "ReluBackward0": _relu,
    "LeakyReluBackward0": _leaky("_saved_self"),
    "LeakyReluBackward1": _leaky("_saved_result"),
    "HardtanhBackward0": _inside("_saved_min_val", "_saved_max_val", ends=False),
    "HardtanhBackward1": _inside("_saved_min_val", "_saved_max_val", ends=False, saved="_saved_result"),
    "ClampBackward1": _inside("_saved_min", "_saved_max"),
    "ClampMinBackward0": _inside("_saved_min", ""),
    "ClampMaxBackward0": _inside("", "_saved_max"),
    "AbsBackward0": _abs,
    "HardsigmoidBackward0": lambda node: ((node._saved_self.abs() < 3).to(node._saved_self) / 6, None),
}
