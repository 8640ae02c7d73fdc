"""Hutchinson's estimator of the diagonal: v * (H v) with Rademacher v (M. F. Hutchinson 1989; Bekas et al. 2007).

Unbiased for any twice-differentiable model, which makes it the fallback; variance of entry k is
sum_{j != k} H_kj^2. The Gauss-Newton part is v * (G v), G v = J^T (d2l/df2) J v, with J v by double backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import UncoveredModelError
from ..objective import Objective
from ..signs import Signs
from .parts import Tensors

PROBE = 2  # stream of signs


def probe(objective: Objective, signs: Signs, replicate: int) -> Tensors:
    """The Rademacher vector of one replicate, the same for every batch."""
    return {
        name: signs.plain(parameter, replicate, PROBE, number)
        for number, (name, parameter) in enumerate(objective.parameters.items())
    }


class Products:
    """Hessian- and Gauss-Newton-vector products on one batch, the loss summed over its samples.

    The graph of the gradient is built once and serves every vector.
    """

    def __init__(
        self, objective: Objective, inputs: Any, targets: Tensor, *, index: int = 0, parts: bool = True
    ) -> None:
        self.objective, self.inputs, self.targets = objective, inputs, targets
        self.names = list(objective.parameters)
        self._parameters = [objective.parameters[name] for name in self.names]
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            outputs = objective.outputs(inputs, targets, index=index)
            losses = objective.loss.values(outputs, targets)
            self._gradient = _gradient(losses.sum(), self._parameters)
            self._outputs = outputs
            self._dummy: Tensor | None = None
            if parts:
                curvature = objective.loss.curvature(outputs, targets)
                self._factor, self._signs = curvature.factor, curvature.signs
                self._dummy = torch.zeros_like(outputs, requires_grad=True)
                self._pulled = torch.autograd.grad(
                    outputs, self._parameters, self._dummy, create_graph=True, allow_unused=True
                )
        self.samples = len(targets)
        self.weight = float(objective.loss.weights(outputs.detach(), targets).sum())

    def hessian(self, vector: Tensors) -> Tensors:
        """H v."""
        pairs = [(g, vector[n]) for g, n in zip(self._gradient, self.names) if g is not None and g.requires_grad]
        if not pairs:
            return {name: torch.zeros_like(vector[name]) for name in self.names}
        with once_more():
            found = torch.autograd.grad(
                [g for g, _ in pairs],
                self._parameters,
                [v for _, v in pairs],
                retain_graph=True,
                allow_unused=True,
            )
        return self._named(found, vector)

    def push(self, vector: Tensors) -> Tensor:
        """J v, the change of the outputs along v, [N, ...]."""
        assert self._dummy is not None
        pairs = [(g, vector[n]) for g, n in zip(self._pulled, self.names) if g is not None]
        (pushed,) = torch.autograd.grad([g for g, _ in pairs], self._dummy, [v for _, v in pairs], retain_graph=True)
        return pushed

    def gauss_newton(self, vector: Tensors) -> Tensors:
        """J^T (d2l/df2) J v."""
        pushed = self.push(vector).double()
        flat = pushed.reshape(len(pushed), -1)
        scalars = (self._factor * flat[None]).sum(2) * self._signs[:, None]
        back = (self._factor * scalars[:, :, None]).sum(0).to(self._outputs.dtype).reshape(self._outputs.shape)
        found = torch.autograd.grad(self._outputs, self._parameters, back, retain_graph=True, allow_unused=True)
        return self._named(found, vector)

    def _named(self, found: Any, like: Tensors) -> Tensors:
        return {
            name: torch.zeros_like(like[name]) if value is None else value.detach()
            for name, value in zip(self.names, found)
        }


def _gradient(loss: Tensor, parameters: list[Any]) -> tuple[Tensor | None, ...]:
    if not loss.requires_grad:
        raise UncoveredModelError(
            "the loss does not depend on the chosen parameters (no autograd graph): does the model run under no_grad?"
        )
    with once_more():
        found: tuple[Tensor | None, ...] = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    return found


@contextmanager
def once_more() -> Iterator[None]:
    """What autograd says of a derivative it does not have, as one exception."""
    try:
        yield
    except RuntimeError as error:
        if "out of memory" in str(error) or "allocate memory" in str(error):
            raise
        hint = "; write it as relu6(x + 3) / 6" if "hardsigmoid" in str(error) else "; no method here measures it"
        raise UncoveredModelError(
            f"the model cannot be differentiated twice: {str(error).splitlines()[0]}{hint}"
        ) from error
