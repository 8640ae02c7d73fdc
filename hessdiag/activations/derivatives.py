"""sigma, sigma' and sigma'' of any elementwise function of one variable, in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hessdiag.errors import ConfigurationError

STEP = 1e-5  # of the central differences, relative to |x|
WIDTH = 1e-2  # and what stands for |x| around 0


class Derivatives:
    """Evaluates a function and its first two derivatives; `exact` if the second, too, comes from autograd."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self._function = function
        check_elementwise(function)
        self.exact = self._autograd_agrees()

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """sigma, sigma', sigma'' at the points x."""
        x = x.to(torch.float64)
        value, slope, second = self._autograd(x, twice=self.exact)
        return value, slope, self._differences(x) if second is None else second

    def bend(self, x: Tensor) -> Tensor:
        """|sigma''| at the points x."""
        return self(x)[2].abs()

    def _autograd(self, x: Tensor, *, twice: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        x = x.detach().clone().requires_grad_()
        y = evaluate(self._function, x)
        if not y.requires_grad:  # constant, or built of steps
            return y.detach(), torch.zeros_like(x), torch.zeros_like(x) if twice else None
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=twice, materialize_grads=True)
        second: Tensor | None = None
        if twice:
            second = torch.zeros_like(x)
            if slope.requires_grad:
                (second,) = torch.autograd.grad(slope.sum(), x, materialize_grads=True)
        return y.detach(), slope.detach(), second

    def _differences(self, x: Tensor, step: float = STEP, width: float = WIDTH) -> Tensor:
        """Central differences of sigma' over `step` times |x|, or times `width` around 0."""
        h = step * x.abs().clamp(min=width)
        up, down = x + h, x - h
        return (self._autograd(up, twice=False)[1] - self._autograd(down, twice=False)[1]) / (up - down)

    def _autograd_agrees(self) -> bool:
        """False if sigma'' by autograd is missing or contradicts the differences of sigma' at most points."""
        side = torch.logspace(-7, 1.5, 171, dtype=torch.float64)
        x = torch.cat([-side, side])
        try:
            second = self._autograd(x, twice=True)[2]
        except ConfigurationError:
            raise
        except RuntimeError:  # not twice differentiable by autograd
            return False
        assert second is not None
        rough, rougher = (self._differences(x, step, 0.0) for step in (1e-4, 2e-4))
        tells = rough.isfinite() & second.isfinite() & ((rough - rougher).abs() <= 1e-2 * rough.abs())
        if not bool(tells.any()):
            return True
        tells &= rough.abs() > 1e-3 * rough[tells].abs().max()
        off = (rough - second).abs() > 1e-1 * torch.maximum(rough.abs(), second.abs())
        return int((tells & off).sum()) * 2 <= int(tells.sum())


def evaluate(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The function at float64 points, with its graph; refused if it fails or gives another shape."""
    try:
        with torch.enable_grad():
            y = function(x)
    except Exception as error:
        raise ConfigurationError(f"the function failed on a float64 vector: {error}") from error
    if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != x.dtype:
        shown = f"{y.dtype} {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise ConfigurationError(f"the function must map a tensor elementwise: float64 {tuple(x.shape)} gave {shown}")
    return y


def check_elementwise(function: Callable[[Tensor], Tensor]) -> None:
    """One result per point whatever the others are, and the same one again."""
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    whole, part = evaluate(function, x).detach(), evaluate(function, x[3:12:2].clone()).detach()
    if not torch.allclose(whole[3:12:2], part, rtol=1e-10, atol=1e-12, equal_nan=True):
        raise ConfigurationError("the function is random or not elementwise: it has no curvature")
