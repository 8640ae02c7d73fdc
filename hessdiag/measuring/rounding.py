"""What double precision itself leaves uncertain in an audit.

On a fitted sample a loss's gradient p - y has lost its digits in any code that subtracts, autograd's included: its
Hessian-vector products are then off by rounding relative to a gradient of order one, however small the Hessian. `unit`
gives the linearisation whose loss has such a gradient; agreement is not asked for beyond `ROUNDINGS` of its entries.

A parameter's effect may cancel as well: a bias below a norm that subtracts the mean, that of the keys of attention. Its
derivatives are then rounding in any code, relative to what is summed up to zero. `Uncancelled` says how large that is:
the same parameter with signs of its own for every entry of what the nodes above it give.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from hessdiag.graph import Linearisation
from hessdiag.graph.nodes import forward_order, is_leaf, sizes
from hessdiag.problem.objective import Objective
from hessdiag.problem.persample import Curvature, Diagonals, Loss

ROUNDINGS = 256.0


def length(tensor: Tensor) -> float:
    """Its norm, in double."""
    return float(torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64))


def uneven(signs: Tensor) -> Tensor:
    """Signs times sizes of 1/2 to 3/2, of mean one, no two alike (multiples of the golden ratio, modulo one).

    Below a softmax, entries that all move alike move nothing: signs alone do so for one pair in two.
    """
    places = torch.arange(1, signs.numel() + 1, dtype=torch.float64, device=signs.device)
    return signs * (0.5 + (places * GOLDEN).frac()).to(signs.dtype).reshape(signs.shape)


GOLDEN = 0.5 * 5.0**0.5 - 0.5


def shortest(tensor: Tensor) -> torch.dtype:
    """The shortest dtype in the graph behind `tensor` and in itself, float32 at the least."""
    inner = [node for node in forward_order(tensor.grad_fn) if not is_leaf(node)] if tensor.grad_fn else []
    found = {tensor.dtype} | {meta.dtype for node in inner for meta in node._input_metadata}
    return torch.float32 if found & {torch.float32, torch.float16, torch.bfloat16} else torch.float64


class _UnitLoss(Loss):
    """The loss with a gradient of random signs and a Hessian of ones, both as large as the outputs."""

    def __init__(self, loss: Loss) -> None:
        self.loss, self.name = loss, loss.name

    def by_sample(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """As the loss does."""
        return self.loss.by_sample(outputs, targets)

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """As the loss does."""
        self.loss.check(outputs, targets)

    def weights(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """As the loss does."""
        return self.loss.weights(outputs, targets)

    def curvature(self, outputs: Tensor, targets: Tensor) -> Curvature:
        """Signs and an identity, scaled."""
        f = outputs.detach().double().reshape(len(outputs), -1)
        size = max(float(f.abs().max()), 1.0)
        gradient = size * torch.cos(torch.arange(f.numel(), device=f.device) * 2.3).sign().to(f).reshape(f.shape)
        columns = Diagonals(torch.full_like(f, size**0.5))
        signs = torch.ones(columns.count, dtype=f.dtype, device=f.device)
        return Curvature(gradient.sum(1), gradient, columns, signs)


def unit(objective: Objective, inputs: Any, targets: Tensor, index: int) -> Linearisation:
    """The linearisation under the unit loss."""
    twin = copy.copy(objective)
    twin.loss = _UnitLoss(objective.loss)
    return Linearisation(twin, inputs, targets, index=index)


HEIGHTS = 4
"""Nodes above a parameter after which nothing of it is taken to be whole any more."""


class Uncancelled:
    """How large derivatives of the outputs are for chosen parameters where nothing cancels, under a loss of order one.

    At the nodes z up to `HEIGHTS` above the parameters, with s of random signs and t = (dz/dp) u: `curved` is
    sum |s t| |H_z (s t)|, `slope` the length of (dz/dp)^T (s dl/dz); the largest of all heights.
    """

    def __init__(self, outputs: Tensor, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters
        self._heights = _heights(outputs, list(parameters.values()))
        with torch.enable_grad():
            size = max(float(outputs.detach().abs().max()), 1.0)
            self._total = size * (_signed(outputs) + 0.5 * outputs.square()).sum()

    def noise(self, size: float) -> float:
        """What rounding may leave of something of this size."""
        return float(ROUNDINGS * torch.finfo(self._total.dtype).eps * size)

    def curved(self, u: Mapping[str, Tensor]) -> float:
        """Along the directions `u` of some of the parameters."""
        return max((self._curved(edges, u) for edges in self._heights), default=0.0)

    def slope(self, name: str) -> float:
        """Of the gradient of one parameter."""
        return max((self._slope(edges, self._parameters[name]) for edges in self._heights), default=0.0)

    def _curved(self, edges: list[GradientEdge], u: Mapping[str, Tensor]) -> float:
        with torch.enable_grad():
            deltas = _grad([self._total], edges, None, create=True)
            seeds = [
                torch.ones(_like(edge).shape, dtype=_like(edge).dtype, device=_like(edge).device) for edge in edges
            ]
            seeds = [seed.requires_grad_(True) for seed in seeds]
            pulled = _grad(edges, [self._parameters[name] for name in u], seeds, create=True)
            pairs = [(g, d) for g, d in zip(pulled, u.values()) if g is not None and g.requires_grad]
            moved = _grad([g for g, _ in pairs], seeds, [d for _, d in pairs])
            along = [None if t is None else _signed(t.detach()) for t in moved]
            ends = [(d, w) for d, w in zip(deltas, along) if d is not None and w is not None and d.requires_grad]
        found = _grad([d for d, _ in ends], edges, [w for _, w in ends])
        return sum(float((h * w).double().abs().sum()) for h, w in zip(found, along) if h is not None and w is not None)

    def _slope(self, edges: list[GradientEdge], parameter: Tensor) -> float:
        return uncancelled(edges, _grad([self._total], edges, None), parameter)


def uncancelled(edges: Sequence[GradientEdge], deltas: Sequence[Tensor | None], parameter: Tensor) -> float:
    """The length of a parameter's gradient if what comes to it by `edges` had signs of its own in every entry."""
    ends = [(edge, _signed(d)) for edge, d in zip(edges, deltas) if d is not None]
    (found,) = _grad([edge for edge, _ in ends], [parameter], [d for _, d in ends])
    return 0.0 if found is None else length(found)


def _heights(outputs: Tensor, parameters: list[nn.Parameter]) -> list[list[GradientEdge]]:
    """By height above the parameters, the outputs of all nodes that take something of the height below."""
    wanted = {id(p) for p in parameters}
    users: dict[int, list[tuple[Any, int]]] = {}
    here: list[Any] = []
    for node in forward_order(outputs.grad_fn):
        if is_leaf(node):
            here += [node] if id(node.variable) in wanted else []
            continue
        for source, number in node.next_functions:
            if source is not None:
                users.setdefault(id(source), []).append((node, number))
    heights = []
    for _ in range(HEIGHTS):
        here = list({id(user): user for node in here for user, _ in users.get(id(node), [])}.values())
        edges = []
        for node in here:
            used = {number for _, number in users.get(id(node), [])}
            used |= {outputs.output_nr} if node is outputs.grad_fn else set()
            edges += [GradientEdge(node, number) for number in sorted(used)]
        heights.append([edge for edge in edges if _like(edge).dtype.is_floating_point])
    return [edges for edges in heights if edges]


def _like(edge: GradientEdge) -> Any:
    return sizes(edge.node, edge.output_nr)


def _signed(tensor: Tensor) -> Tensor:
    """Each entry under a sign of its own."""
    wave = torch.cos(torch.arange(tensor.numel(), dtype=torch.float64, device=tensor.device) * 2.3).sign()
    return tensor * wave.to(tensor.dtype).reshape(tensor.shape)


def _grad(ends: Sequence[Any], wrt: Sequence[Any], along: Any, *, create: bool = False) -> Sequence[Tensor | None]:
    if not ends:
        return [None] * len(wrt)
    found: Sequence[Tensor | None] = torch.autograd.grad(
        ends, wrt, along, retain_graph=True, create_graph=create, allow_unused=True
    )
    return found
