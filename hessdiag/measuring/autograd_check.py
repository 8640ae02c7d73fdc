"""Whether autograd's derivatives are the model's and the loss's: held against difference quotients.

A custom function with a wrong backward, a backward that forgets what it depends on, detach(), no_grad() or a
straight-through estimator give a plausible gradient or Hessian of another function. No method here can do without
autograd's derivatives, so all are refused the same way. Along one direction u of all parameters, large where the
gradient is, for a well-conditioned scalar S of the outputs (a fitted loss is rounding; it is looked at by itself):

slope       u . grad S by autograd, the mean of two ends, against the quotient (S(theta + h u) - S(theta)) / h: all
            tensors add to it, of one sign;
difference  H u against (grad S(theta + h u) - grad S(theta)) / h, tensor by tensor;
loss        for a callable loss, both of the loss as a function of the outputs alone.

They are taken in float64, of a copy of the model or of the model itself, lent (see `copies`). What runs in float32
alone has its own parameters moved, in other memory meanwhile, by steps h of 1/100 to 1/1000 from both sides, along u no
longer than moves S by its own size. Tolerances are the same, beyond what rounding leaves of a quotient: 256 eps of S,
or of a tensor's gradient, over h, which is 0.3% to 3%. A slope or tensor of which that is more than half is not
compared, nor is a difference that is off where such a step may cross a kink, and the audit says so.

What one step leaves in doubt is looked at from both sides, and with other steps. Parameters stand a little off where
they were: off the kinks that zeros sit on. A row of an embedding that its padding_idx keeps from having a gradient is a
constant, and not moved.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hessdiag.errors import HessdiagError, NonFiniteError, UncoveredModelError
from hessdiag.graph import saved
from hessdiag.graph.nodes import forward_order, is_leaf
from hessdiag.kernels.products import Products
from hessdiag.measuring.rounding import ROUNDINGS, Uncancelled, length, shortest
from hessdiag.methods.batches import Numbered
from hessdiag.problem.objective import WRITES, Objective
from hessdiag.problem.persample import CallableLoss, Curvature, Loss, as_rows

STEPS = {
    torch.float64: ((1e-7, 0.0), (1e-7, -1e-7), (1e-8, -1e-8), (1e-6, -1e-6)),
    torch.float32: ((1e-2, -1e-2), (3e-3, -3e-3), (1e-3, -1e-3)),
}
"""The ends of relative steps: in double so small that no unit of a piecewise-linear network changes sides, or none at
one; in float32 as large as rounding asks for."""
MOVED = 1e-3
LOSS_STEPS = {
    torch.float64: ((1e-6, MOVED),),
    torch.float32: ((1e-2, MOVED), (1e-3, 0.05), (1e-3, -0.05)),
}
"""Relative steps in the outputs, both ways, and how far off their place: where step and rounding are not far apart, a
kink may lie between the ends, and is not at several places.
"""


class Probe(Loss):
    """S = sum of the outputs under random signs and of half their squares: gradient and Hessian of order one."""

    name = "probe"

    def values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """S, sample by sample."""
        rows = as_rows(outputs)
        signs = torch.cos(torch.arange(rows.numel(), device=rows.device) * 2.3).sign().to(rows).reshape(rows.shape)
        return (rows * signs).sum(1) + 0.5 * rows.square().sum(1)


class WritesError(UncoveredModelError):
    """A model whose forward pass writes to its own parameters."""


@dataclass(frozen=True)
class Quotients:
    """What the comparisons found: `slope` for all, `apart` naming parameters cut off, `difference` for each tensor.

    None is what rounding or kinks leave open.
    """

    slope: float | None
    apart: tuple[str, ...]
    difference: dict[str, float | None]


@dataclass(frozen=True)
class _Seen:
    """One quotient of one tensor: how far off beyond its noise, and the size of what is compared."""

    beyond: float
    size: float
    noise: float
    step: float

    def above(self, floor: float) -> _Seen:
        """With what rounding leaves of what cancels."""
        more = floor / self.step
        return _Seen(max(self.beyond - more, 0.0), self.size, self.noise + more, self.step)

    @property
    def tells(self) -> bool:
        """Whether a derivative that is off by half would be seen; nothing that is zero is off."""
        return self.noise <= 0.5 * self.size or self.size == 0.0


class Moved:
    """A model, in float64 as a rule, moved off its kinks, with S and its gradient along one direction.

    `directions` are random, moved along and then used up. The parameters of `objective`, whose loss is S, are moved
    here, unseen by graphs that are held of them, and left where the last comparison put them; `outputs` are set by
    whoever runs it next. `whole` keeps graphs that the model itself may hold.
    """

    outputs: Tensor

    def __init__(
        self, objective: Objective, few: Numbered, directions: dict[str, Tensor], *, whole: bool = False
    ) -> None:
        self.objective, self.directions, self.parameters = objective, directions, objective.parameters
        self.inputs, self.targets, self.index = few.inputs, few.targets, few.index
        self.size = {n: length(p) / p.numel() ** 0.5 or 1e-3 for n, p in self.parameters.items()}
        for name, p in self.parameters.items():
            p.data.add_(directions[name], alpha=MOVED * self.size[name])
        self._here, self._whole = 0.0, whole

    def run(self, *, slope: float, difference: float) -> Quotients:
        """Everything. Beyond the tolerances `slope` and `difference` it is looked at more closely: from both sides,
        which parameters are cut off, whether other steps agree.
        """
        dtype = shortest(self.outputs)
        eps, double = torch.finfo(dtype).eps, dtype == torch.float64
        middle = self.objective, self.inputs, self.targets
        products = Products(*middle, index=self.index, parts=False, outputs=self.outputs)
        gradient = {n: None if g is None else g.detach() for n, g in zip(products.names, products._gradient)}
        value = float(self.objective.loss.values(self.outputs.detach(), self.targets).sum())
        here = value, {n: torch.zeros_like(self.parameters[n]) if g is None else g for n, g in gradient.items()}
        along = self._direction(gradient, products)
        size = abs(value) if double else self._shorten(along, gradient)
        curved = products.hessian(along)
        norms = {n: 0.0 if g is None else length(g) for n, g in gradient.items()}
        norm = sum(size**2 for size in norms.values()) ** 0.5
        off = dict.fromkeys(along, float("inf"))
        apart = tuple[str, ...]()
        found, tells = float("inf"), False
        seen: dict[str, list[_Seen]] = {name: [] for name in along}
        room = next(iter(along.values())).new_empty(max(u.numel() for u in along.values()))
        for number, ends in enumerate(STEPS[dtype]):
            (high, above), (low, below) = (self._at(along, end, gradient=True) if end else here for end in ends)
            width, step = ends[0] - ends[1], ends[0]
            if found > slope and (number < 2 or not double):
                rounding = ROUNDINGS * eps * size / step
                off_slope, told = _slope([above, below], along, (high - low) / width, rounding)
                if double or told:
                    found, tells = min(found, off_slope), True
                    if ends[1] and found > slope:
                        apart = self._cut_off(gradient, along, ends, slope, eps)
            for name in along:
                own = room[: above[name].numel()].view(above[name].shape)
                quotient = torch.sub(above[name], below[name], out=own).div_(width)
                noise = ROUNDINGS * eps * (norm if double else norms[name]) / step
                beyond = max(length(quotient.sub_(curved[name])) - noise, 0.0)
                full = max(length(quotient.add_(curved[name])), length(curved[name])) if beyond or not double else 1.0
                seen[name].append(_Seen(beyond, full, noise, step))
                off[name] = min(off[name], beyond / full if beyond else 0.0)
            if max(off.values(), default=0.0) <= difference and (number or found <= slope) and double:
                break
        left = [name for name, value in off.items() if value > difference]
        for name, floor in self._floors(left, eps).items():
            seen[name] = [one.above(floor) for one in seen[name]]
            off[name] = min(one.beyond / one.size if one.beyond else 0.0 for one in seen[name])
        self._look_around(along)
        if double:
            return Quotients(found, apart, dict(off))
        kinks = has_kinks(self.outputs)
        least = {name: _least([one for one in seen[name] if one.tells], difference, kinks) for name in off}
        return Quotients(found if tells else None, apart if found > slope else (), least)

    def _look_around(self, along: dict[str, Tensor]) -> None:
        """All entries upward of where the model stood, and downward: the rest was on one side of any bound it sets."""
        self._move(along, 0.0)
        for way in (1.0, -2.0):
            for name, p in self.parameters.items():
                p.data.add_(4.0 * way * MOVED * self.size[name])
            with self.staying(), contextlib.suppress(NonFiniteError), torch.no_grad():
                self.objective.outputs(self.inputs, self.targets, index=self.index)

    def _floors(self, names: list[str], eps: float) -> dict[str, float]:
        """What rounding leaves of gradients that may cancel, by a pass of its own: the others were moved away from."""
        if not names:
            return {}
        with torch.enable_grad():
            outputs = self.objective.outputs(self.inputs, self.targets, index=self.index)
        whole = {name: Uncancelled(outputs, {name: self.parameters[name]}) for name in names}
        return {name: ROUNDINGS * eps * one.slope(name) for name, one in whole.items()}

    def _direction(self, gradient: dict[str, Tensor | None], products: Products) -> dict[str, Tensor]:
        fixed = _padding(products.outputs)
        along = {}
        for name, p in self.parameters.items():
            u, g = self.directions[name], gradient[name]
            size = 0.0 if g is None else length(g)
            if g is not None and size:  # on the side of u where both add up: single numbers could be opposite
                u.add_(g, alpha=math.copysign(p.numel() ** 0.5 / size, float(g.flatten() @ u.flatten())))
            for leaf, row in fixed:
                if leaf is p:
                    u[row] = 0
            along[name] = u.mul_(self.size[name])
        return along

    def _shorten(self, along: dict[str, Tensor], gradient: dict[str, Tensor | None]) -> float:
        """The size of what S consists of, and directions along which it changes by that, no more: rounding asks for
        no longer ones.
        """
        rows = as_rows(self.outputs.detach()).double()
        parts = float(rows.abs().sum() + 0.5 * rows.square().sum())
        terms = sum(float(g.flatten() @ along[n].flatten()) for n, g in gradient.items() if g is not None)
        for u in along.values() if terms > parts else ():
            u.mul_(parts / terms)
        return parts

    def _cut_off(
        self,
        gradient: dict[str, Tensor | None],
        along: dict[str, Tensor],
        ends: tuple[float, float],
        tolerance: float,
        eps: float,
    ) -> tuple[str, ...]:
        """Parameters without any gradient, if leaving them where they are mends the slope."""
        names = tuple(name for name, g in gradient.items() if g is None)
        if not names:
            return ()
        self._move(along, 0.0)
        rest = {name: u for name, u in along.items() if name not in names}
        high, low = ends
        values = [self._at(rest, end, gradient=False)[0] for end in (high, low)]
        self._move(rest, 0.0)
        noise = ROUNDINGS * eps * abs(values[0]) / high
        off, _ = _slope([gradient], rest, (values[0] - values[1]) / (high - low), noise)
        return names if off <= tolerance else ()

    def _at(self, along: dict[str, Tensor], step: float, *, gradient: bool) -> tuple[float, dict[str, Tensor]]:
        """(S, its gradient) with the parameters `step * along` from the middle."""
        self._move(along, step)
        with torch.set_grad_enabled(gradient):
            value, _ = self.objective.summed_loss(self.inputs, self.targets, index=self.index)
        found: Any = [None] * len(self.parameters)
        if gradient:
            wanted = list(self.parameters.values())
            found = torch.autograd.grad(value, wanted, retain_graph=self._whole, allow_unused=True)
        pairs = zip(self.parameters.items(), found)
        return float(value.detach()), {name: torch.zeros_like(p) if g is None else g.detach() for (name, p), g in pairs}

    def _move(self, along: dict[str, Tensor], step: float) -> None:
        for name, u in along.items():
            self.parameters[name].data.add_(u, alpha=step - self._here)
        self._here = step

    def _bits(self) -> dict[str, int]:
        """The sum of each parameter's bits, which one entry cannot change alone without changing it."""
        words = {torch.float64: torch.int64, torch.float32: torch.int32}
        return {
            name: int(p.detach().contiguous().view(words[p.dtype]).sum(dtype=torch.int64))
            for name, p in self.parameters.items()
        }

    @contextlib.contextmanager
    def staying(self) -> Iterator[None]:
        """Refuse a model whose forward pass undoes a move: its quotients would be of other steps than were taken."""
        before = self._bits()
        yield
        for name, bits in self._bits().items():
            if bits != before[name]:
                raise WritesError(WRITES.format(name=name))


def _slope(
    gradients: Sequence[Mapping[str, Tensor | None]], along: dict[str, Tensor], quotient: float, noise: float
) -> tuple[float, bool]:
    """How far u . grad S, the mean of some places, is off a quotient, relative to its terms; whether noise is less."""
    terms = []
    for name, u in along.items():
        found = (one[name] for one in gradients)
        terms.append(sum(float(g.flatten() @ u.flatten()) for g in found if g is not None) / len(gradients))
    scale = max(sum(abs(t) for t in terms), abs(quotient))
    off = max(abs(quotient - sum(terms)) - noise, 0.0)
    return off / scale if off else 0.0, noise <= 0.5 * scale or scale == 0.0


def _least(seen: Sequence[_Seen], tolerance: float, kinks: bool) -> float | None:
    """The least deviation over the steps that tell anything; what kinks can account for is left open."""
    least = min((one.beyond / one.size if one.beyond else 0.0 for one in seen), default=None)
    return None if least is not None and least > tolerance and kinks else least


KINKED = (
    "elu", "threshold", "hard", "abs", "max", "min", "clamp", "clip", "shrink", "sgn", "sort", "topk", "median",
    "quantile", "where", "huber", "smoothl1", "l1loss", "kthvalue", "mode", "floor", "round", "ceil", "trunc",
)  # fmt: skip
"""Words in the names of nodes that may bend at once."""


def has_kinks(outputs: Tensor) -> bool:
    """Whether a step that is not small may cross a kink; of a function that is not torch's nobody knows."""
    for node in forward_order(outputs.grad_fn):
        own = isinstance(node, torch.autograd.function.BackwardCFunction)
        name = node.name().lower().replace("softmax", "").replace("gelu", "")
        if own or any(word in name for word in KINKED):
            return True
    return False


def _padding(outputs: Tensor) -> list[tuple[Any, int]]:
    """(parameter, row) that a lookup keeps from having a gradient."""
    found = []
    for node in forward_order(outputs.grad_fn):
        row = saved.integer(node, "padding_idx", -1) if "Embedding" in node.name() else -1
        leaf: Any = node.next_functions[0][0] if node.next_functions else None
        if is_leaf(leaf) and 0 <= row < len(leaf.variable):
            found.append((leaf.variable, row))
    return found


def loss_quotients(loss: Loss, outputs: Tensor, targets: Tensor) -> float | None:
    """Gradient and Hessian of a callable loss against quotients, the larger deviation; 0 for losses known by name.

    In double where the loss runs so, else with the steps and the rounding of float32. None where it does not run twice:
    nothing was compared.
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
    return None


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
