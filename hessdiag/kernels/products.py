"""Products of a vector with the Hessian and with the Gauss-Newton matrix of one batch, by double backward.

H v is the derivative of <gradient, v>; G v = J^T (d2l/df2) J v, with J v the derivative of <J^T u, v> in u, which is
linear in u: any will do, but some of torch's own (logcumsumexp) have no derivative at zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hessdiag.errors import UncoveredModelError, ran_out
from hessdiag.kernels.tensors import Tensors
from hessdiag.problem.objective import Objective


class Products:
    """Hessian- and Gauss-Newton-vector products on one batch, the loss summed over its samples.

    The graph of the gradient is built once and serves every vector. `outputs` are the model's, with their graph, where
    they are at hand.
    """

    def __init__(
        self,
        objective: Objective,
        inputs: Any,
        targets: Tensor,
        *,
        index: int = 0,
        parts: bool = True,
        outputs: Tensor | None = None,
    ) -> None:
        self.objective, self.inputs, self.targets = objective, inputs, targets
        self.names = list(objective.parameters)
        self._parameters = [objective.parameters[name] for name in self.names]
        with torch.enable_grad():
            if outputs is None:
                outputs = objective.outputs(inputs, targets, index=index)
            losses = objective.loss.values(outputs, targets)
            self._gradient = _gradient(losses.sum(), self._parameters)
            self.outputs = outputs
            self._dummy: Tensor | None = None
            if parts:
                self._curvature = objective.loss.curvature(outputs, targets)
                self._dummy = torch.ones_like(outputs, requires_grad=True)
                self._pulled = torch.autograd.grad(
                    outputs, self._parameters, self._dummy, create_graph=True, allow_unused=True
                )
        self.samples = len(targets)

    @cached_property
    def weight(self) -> float:
        """What the batch adds to the divisor of the mean."""
        with torch.no_grad():
            return float(self.objective.loss.weights(self.outputs, self.targets).sum())

    def hessian(self, vector: Tensors) -> Tensors:
        """H v; of the block of some parameters, where `vector` names only those."""
        pairs = [
            (g, vector[n])
            for g, n in zip(self._gradient, self.names)
            if n in vector and g is not None and g.requires_grad
        ]
        if not pairs:
            return {name: torch.zeros_like(v) for name, v in vector.items()}
        with once_more():
            found = torch.autograd.grad(
                [g for g, _ in pairs],
                [self.objective.parameters[name] for name in vector],
                [v for _, v in pairs],
                retain_graph=True,
                allow_unused=True,
            )
        return _named(found, vector)

    def entries(self, name: str, places: list[int]) -> list[float]:
        """Some entries of the diagonal, counted in the order of the parameter's axes."""
        parameter, gradient = self.objective.parameters[name], self._gradient[self.names.index(name)]
        if gradient is None or not gradient.requires_grad:
            return [0.0] * len(places)
        flat, found = self._zeros[: parameter.numel()], []
        unit = flat.view(parameter.shape)
        with once_more():
            for k in places:
                flat[k] = 1
                (row,) = torch.autograd.grad(gradient, parameter, unit, retain_graph=True, allow_unused=True)
                flat[k] = 0
                found.append(0.0 if row is None else float(row.reshape(-1)[k]))
        return found

    @cached_property
    def _zeros(self) -> Tensor:
        """As many as the largest parameter has entries."""
        return self._parameters[0].detach().new_zeros(max(p.numel() for p in self._parameters))

    def push(self, vector: Tensors) -> Tensor:
        """J v, the change of the outputs along v, [N, ...]."""
        assert self._dummy is not None
        pairs = [(g, vector[n]) for g, n in zip(self._pulled, self.names) if g is not None and g.requires_grad]
        if not pairs:  # J is zero: all parameters stand behind a step (sign, round, floor)
            return torch.zeros_like(self._dummy)
        roots, along = [g for g, _ in pairs], [v for _, v in pairs]
        (pushed,) = torch.autograd.grad(roots, self._dummy, along, retain_graph=True, materialize_grads=True)
        return pushed

    def gauss_newton(self, vector: Tensors) -> Tensors:
        """J^T (d2l/df2) J v."""
        pushed = self.push(vector).double()
        flat = pushed.reshape(len(pushed), -1)
        back = self._curvature.times(flat).to(self.outputs.dtype).reshape(self.outputs.shape)
        found = torch.autograd.grad(self.outputs, self._parameters, back, retain_graph=True, allow_unused=True)
        return _named(found, vector)


def one_hot(parameter: Tensor, name: str, k: int | None = None) -> Tensors:
    """The direction of one entry (in the order of the axes, however the parameter lies in memory), or of none."""
    unit = torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device)
    if k is not None:
        unit.view(-1)[k] = 1
    return {name: unit}


def _named(found: Any, like: Tensors) -> Tensors:
    pairs = zip(like.items(), found)
    return {name: torch.zeros_like(own) if value is None else value.detach() for (name, own), value in pairs}


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
        if ran_out(error):
            raise
        hint = "; write it as relu6(x + 3) / 6" if "hardsigmoid" in str(error) else "; no method here measures it"
        raise UncoveredModelError(
            f"the model cannot be differentiated twice: {str(error).splitlines()[0]}{hint}"
        ) from error
