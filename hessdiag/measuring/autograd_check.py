"""Whether autograd's derivatives are the model's and the loss's: held against difference quotients in float64.

A custom function with a wrong backward, a backward that forgets what it depends on, detach(), no_grad() or a
straight-through estimator give a plausible gradient or Hessian of another function. No method here can do without
autograd's derivatives, so all are refused the same way. Along one direction u of all parameters, large where the
gradient is, for a well-conditioned scalar S of the outputs (a fitted loss is rounding; it is looked at by itself):

slope       u . grad S by autograd, the mean of two ends, against the quotient (S(theta + h u) - S(theta)) / h: all
            tensors add to it, of one sign;
difference  H u against (grad S(theta + h u) - grad S(theta)) / h, tensor by tensor;
loss        for a callable loss, both of the loss as a function of the outputs alone.

What one step leaves in doubt is looked at from both sides, and with other steps. Parameters stand a little off where
they were: off the kinks that zeros sit on. A row of an embedding that its padding_idx keeps from having a gradient is a
constant, and not moved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hessdiag.errors import HessdiagError
from hessdiag.graph import saved
from hessdiag.graph.nodes import forward_order, is_leaf
from hessdiag.kernels.products import Products
from hessdiag.measuring.rounding import ROUNDINGS, Uncancelled, length, shortest
from hessdiag.methods.batches import Numbered
from hessdiag.problem.objective import Objective
from hessdiag.problem.persample import CallableLoss, Curvature, Loss, as_rows

STEPS = ((1e-7, 0.0), (1e-7, -1e-7), (1e-8, -1e-8), (1e-6, -1e-6))
"""The ends of relative steps; so small that no unit of a piecewise-linear network changes sides, or none at one."""
MOVED = 1e-3
LOSS_STEPS = {
    torch.float64: ((1e-6, MOVED),),
    torch.float32: ((1e-2, MOVED), (1e-3, 0.05), (1e-3, -0.05)),
}
"""Relative steps in the outputs, both ways, and how far off their place: where step and rounding are not far apart, a
kink may lie between the ends, and is not at several places.
"""
_EPS = torch.finfo(torch.float64).eps


class Probe(Loss):
    """S = sum of the outputs under random signs and of half their squares: gradient and Hessian of order one."""

    name = "probe"

    def values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """S, sample by sample."""
        rows = as_rows(outputs)
        signs = torch.cos(torch.arange(rows.numel(), device=rows.device) * 2.3).sign().to(rows).reshape(rows.shape)
        return (rows * signs).sum(1) + 0.5 * rows.square().sum(1)


@dataclass(frozen=True)
class Quotients:
    """What the comparisons found: `slope` for all, `apart` naming parameters cut off, `difference` for each tensor."""

    slope: float
    apart: tuple[str, ...]
    difference: dict[str, float]


class Moved:
    """A copy of the model in float64, moved off its kinks, with S and its gradient along one direction.

    `directions` are random, moved along and then used up. The parameters of `objective`, whose loss is S, are
    moved here and left where the last comparison put them; `outputs` are set by whoever runs it next.
    """

    outputs: Tensor

    def __init__(self, objective: Objective, few: Numbered, directions: dict[str, Tensor]) -> None:
        self.objective, self.directions, self.parameters = objective, directions, objective.parameters
        self.inputs, self.targets, self.index = few.inputs, few.targets, few.index
        self.size = {n: length(p) / p.numel() ** 0.5 or 1e-3 for n, p in self.parameters.items()}
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.add_(directions[name], alpha=MOVED * self.size[name])
        self._here = 0.0

    def run(self, *, slope: float, difference: float) -> Quotients:
        """Everything. Beyond the tolerances `slope` and `difference` it is looked at more closely: from both sides,
        which parameters are cut off, whether other steps agree.
        """
        middle = self.objective, self.inputs, self.targets
        products = Products(*middle, index=self.index, parts=False, outputs=self.outputs)
        gradient = {n: None if g is None else g.detach() for n, g in zip(products.names, products._gradient)}
        value = float(self.objective.loss.values(self.outputs.detach(), self.targets).sum())
        here = value, {n: torch.zeros_like(self.parameters[n]) if g is None else g for n, g in gradient.items()}
        along = self._direction(gradient, products)
        curved = products.hessian(along)
        norm = sum(length(g) ** 2 for g in gradient.values() if g is not None) ** 0.5
        off = dict.fromkeys(along, float("inf"))
        apart = tuple[str, ...]()
        found = float("inf")
        seen: dict[str, list[tuple[float, float, float]]] = {name: [] for name in along}
        room = next(iter(along.values())).new_empty(max(u.numel() for u in along.values()))
        for number, ends in enumerate(STEPS):
            (high, above), (low, below) = (self._at(along, end, gradient=True) if end else here for end in ends)
            width, step = ends[0] - ends[1], ends[0]
            if number < 2 and found > slope:
                rounding = ROUNDINGS * _EPS * abs(value) / step
                found = _slope([above, below], along, (high - low) / width, rounding)
                if number and found > slope:
                    apart = self._cut_off(gradient, along, slope)
            noise = ROUNDINGS * _EPS * norm / step
            for name in along:
                own = room[: above[name].numel()].view(above[name].shape)
                quotient = torch.sub(above[name], below[name], out=own).div_(width)
                beyond = max(length(quotient.sub_(curved[name])) - noise, 0.0)
                size = max(length(quotient.add_(curved[name])), length(curved[name])) if beyond else 1.0
                seen[name].append((beyond, size, step))
                off[name] = min(off[name], beyond / size)
            if max(off.values(), default=0.0) <= difference and (number or found <= slope):
                break
        left = [name for name, value in off.items() if value > difference]
        for name, floor in self._floors(left).items():
            off[name] = min(max(beyond - floor / step, 0.0) / size for beyond, size, step in seen[name])
        return Quotients(found, apart, off)

    def _floors(self, names: list[str]) -> dict[str, float]:
        """What rounding leaves of gradients that may cancel, by a pass of its own: the others were moved away from."""
        if not names:
            return {}
        with torch.enable_grad():
            outputs = self.objective.outputs(self.inputs, self.targets, index=self.index)
        whole = {name: Uncancelled(outputs, {name: self.parameters[name]}) for name in names}
        return {name: one.noise(one.slope(name)) for name, one in whole.items()}

    def _direction(self, gradient: dict[str, Tensor | None], products: Products) -> dict[str, Tensor]:
        fixed = _padding(products.outputs)
        along = {}
        for name, p in self.parameters.items():
            u, g = self.directions[name], gradient[name]
            size = 0.0 if g is None else length(g)
            if (
                g is not None and size
            ):  # on the side of u where the two add up: of a single number they could be opposite
                u.add_(g, alpha=math.copysign(p.numel() ** 0.5 / size, float(g.flatten() @ u.flatten())))
            for leaf, row in fixed:
                if leaf is p:
                    u[row] = 0
            along[name] = u.mul_(self.size[name])
        return along

    def _cut_off(
        self, gradient: dict[str, Tensor | None], along: dict[str, Tensor], tolerance: float
    ) -> tuple[str, ...]:
        """Parameters without any gradient, if leaving them where they are mends the slope."""
        names = tuple(name for name, g in gradient.items() if g is None)
        if not names:
            return ()
        self._move(along, 0.0)
        rest = {name: u for name, u in along.items() if name not in names}
        high, low = STEPS[1]
        values = [self._at(rest, end, gradient=False)[0] for end in (high, low)]
        self._move(rest, 0.0)
        noise = ROUNDINGS * _EPS * abs(values[0]) / high
        off = _slope([gradient], rest, (values[0] - values[1]) / (high - low), noise)
        return names if off <= tolerance else ()

    def _at(self, along: dict[str, Tensor], step: float, *, gradient: bool) -> tuple[float, dict[str, Tensor]]:
        """(S, its gradient) with the parameters `step * along` from the middle."""
        self._move(along, step)
        with torch.set_grad_enabled(gradient):
            value, _ = self.objective.summed_loss(self.inputs, self.targets, index=self.index)
        found: Any = [None] * len(self.parameters)
        if gradient:
            found = torch.autograd.grad(value, list(self.parameters.values()), allow_unused=True)
        pairs = zip(self.parameters.items(), found)
        return float(value.detach()), {name: torch.zeros_like(p) if g is None else g.detach() for (name, p), g in pairs}

    def _move(self, along: dict[str, Tensor], step: float) -> None:
        with torch.no_grad():
            for name, u in along.items():
                self.parameters[name].add_(u, alpha=step - self._here)
        self._here = step


def _slope(
    gradients: Sequence[Mapping[str, Tensor | None]], along: dict[str, Tensor], quotient: float, noise: float
) -> float:
    """How far u . grad S, the mean of some places, is off a quotient, relative to its terms."""
    terms = []
    for name, u in along.items():
        found = (one[name] for one in gradients)
        terms.append(sum(float(g.flatten() @ u.flatten()) for g in found if g is not None) / len(gradients))
    scale = max(sum(abs(t) for t in terms), abs(quotient))
    off = max(abs(quotient - sum(terms)) - noise, 0.0)
    return off / scale if off else 0.0


def _padding(outputs: Tensor) -> list[tuple[Any, int]]:
    """(parameter, row) that a lookup keeps from having a gradient."""
    found = []
    for node in forward_order(outputs.grad_fn):
        row = saved.integer(node, "padding_idx", -1) if "Embedding" in node.name() else -1
        leaf: Any = node.next_functions[0][0] if node.next_functions else None
        if is_leaf(leaf) and 0 <= row < len(leaf.variable):
            found.append((leaf.variable, row))
    return found


def loss_quotients(loss: Loss, outputs: Tensor, targets: Tensor) -> float:
    """Gradient and Hessian of a callable loss against quotients, the larger deviation; 0 for losses known by name.

    In double where the loss runs so, else with the steps and the rounding of float32. Nothing is said where it does not
    run twice.
    """
    if not isinstance(loss, CallableLoss):
        return 0.0
    for f in (outputs.detach().double(), outputs.detach()):
        size = max(float(f.double().square().mean().sqrt()), 1e-3)
        wave = torch.cos(torch.arange(f.numel(), dtype=torch.float64, device=f.device) * 1.3 + 0.4).reshape(f.shape)
        try:
            with torch.enable_grad():
                dtype = shortest(loss.in_double(f.clone().requires_grad_(True), targets)[1])
            places = [
                [
                    loss.curvature((f.double() + size * (moved * wave.flip(0).sin() + end * wave)).to(f), targets)
                    for end in (0.0, step, -step)
                ]
                for step, moved in LOSS_STEPS[dtype]
            ]
        except (HessdiagError, RuntimeError):
            continue
        u, eps = as_rows(size * wave), torch.finfo(dtype).eps
        found = [_loss_off(ends, u, size, step, eps) for ends, (step, _) in zip(places, LOSS_STEPS[dtype])]
        return max(min(slope for slope, _ in found), min(curved for _, curved in found))
    return 0.0


def _loss_off(ends: Sequence[Curvature], u: Tensor, size: float, step: float, eps: float) -> tuple[float, float]:
    """How far the loss's slope along `u` and its Hessian's product with it are off quotients, beyond rounding."""
    middle, high, low = ends
    found = []
    for quotient, mine, noise in (
        ((high.loss - low.loss) / (2 * step), (middle.gradient * u).sum(1), middle.loss),
        ((high.gradient - low.gradient) / (2 * step), middle.times(u), middle.gradient),
    ):
        floor = ROUNDINGS * eps * (length(noise) + size) / step
        off = max(length(quotient - mine) - floor, 0.0)
        found.append(off / max(length(quotient), length(mine)) if off else 0.0)
    return found[0], found[1]
