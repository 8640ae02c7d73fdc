"""The largest curvature of an activation, by name, by module or as any function of a tensor."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache

from torch import Tensor, nn

from hessdiag.activations.module import RCTAF
from hessdiag.activations.pointwise import RegisteredActivation
from hessdiag.activations.registry import build
from hessdiag.activations.supremum import Curvature, supremum
from hessdiag.errors import ConfigurationError

Function = str | nn.Module | type[nn.Module] | Callable[[Tensor], Tensor]


def curvature(activation: Function) -> Curvature:
    """The supremum of |sigma''| over the real line and where it is reached; infinite where sigma' jumps.

    RCT-AF of beta <= 2 is known in closed form (E[2], E[4], E[6] of arXiv 2603.23860: alpha/4, alpha/2,
    alpha, at 0); for everything else see `supremum` for the numerical method and its limits.

    Where a registered activation declares its supremum it is that, and no place is told.

    >>> curvature("rct:beta=2,alpha=5")
    Curvature(value=5.0, at=(0.0,))
    >>> curvature("relu")
    Curvature(value=inf, at=(0.0,))
    """
    if isinstance(activation, str):
        return _of_spec(activation)
    if isinstance(activation, type):
        return _of_module(build(activation))
    if isinstance(activation, nn.Module):
        return _of_module(copy.deepcopy(activation))
    if not callable(activation):
        got = type(activation).__name__
        raise ConfigurationError(f"an activation is a name, a module or a function, got {got}")
    return supremum(activation)


def max_curvature(activation: Function) -> float:
    """The supremum of |sigma''| over the real line: see `curvature`.

    >>> round(max_curvature("mish"), 4)
    0.6442
    """
    return curvature(activation).value


@lru_cache(maxsize=256)
def _of_spec(spec: str) -> Curvature:
    return _of_module(build(spec))


def _of_module(module: nn.Module) -> Curvature:
    """`module` is ours to change: float64, on the CPU, in evaluation mode."""
    if isinstance(module, RCTAF) and module.beta <= 2:
        return Curvature(module.max_curvature, (0.0,))
    if isinstance(module, RCTAF):
        unit = supremum(RCTAF(1.0, module.beta))
        return Curvature(unit.value * module.alpha, tuple(x / module.alpha for x in unit.at))
    if isinstance(module, RegisteredActivation) and module.activation.max_curvature is not None:
        return Curvature(float(module.activation.max_curvature(**module.options)), ())
    return supremum(module.double().cpu().eval().requires_grad_(False))
