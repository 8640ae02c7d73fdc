"""Parameters that are added or multiplied elementwise: sums over the axes on which they are broadcast.

What meets the other input is w, the parameter itself or what became of it on the way (`hessdiag.graph.carried`). Every
entry of the output is made with one entry of w, and so with one of the parameter.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hessdiag.errors import UncoveredModelError
from hessdiag.graph.carried import Carried
from hessdiag.graph.chunks import grouped, spread
from hessdiag.graph.layers.layer import Half, LayerKind, Parts
from hessdiag.graph.nodes import sizes
from hessdiag.graph.sites.site import Legs
from hessdiag.graph.tangents import Tangent, broadcast

if TYPE_CHECKING:
    from hessdiag.graph.reading import Graph


def own_slot(node: Any, graph: Graph) -> list[Carried]:
    """The parameters that one input of the node is, or is computed from; refused if two inputs are."""
    found = [ways for slot in range(len(node.next_functions)) if (ways := graph.carried(node, slot))]
    if len(found) > 1:
        graph.refuse(node, f"parameters from two sides, {found[0][0].name!r} and {found[1][0].name!r}")
    return found[0] if found else []


class Broadcast(LayerKind):
    """a = x (.) w entry by entry, w broadcast over the samples, or with rows of its own for each."""

    sole = False

    @abstractmethod
    def scaled(self, delta: Tensor, power: int = 1) -> Tensor:
        """Delta (da/dw)^power, before any sum."""

    def read(self) -> None:
        """How w comes from the parameter, and whether it has rows of its own."""
        assert self.layer.carried is not None
        self.way = self.layer.carried
        self.shape = self.way.shape
        whole = len(self.shape) == len(self.out) and self.shape[0] == self.rows
        if whole and self.samples == 1 and self.way.index is None:  # rows of w are rows of the one sample there is
            places = torch.arange(self.shape.numel(), device=sizes(self.layer.node).device).reshape(self.shape)
            self.way = replace(self.way, index=places)
        self.own_rows = whole and self.way.index is not None
        if len(self.shape) == len(self.out) and self.shape[0] != 1 and not self.own_rows:
            raise UncoveredModelError(
                f"parameter {self._name!r} comes to the samples in the shape {list(self.shape)}, with rows that follow "
                "their places in the batch; use method='hutchinson' (or 'auto')"
            )

    def per_group(self, delta: Tensor, group: int, *, squares: bool) -> Parts:
        """Of what reaches the parameter, summed where it was broadcast."""
        yield self._name, iter([grouped(self._per_row(delta), group * self.fold)])

    def weighted(self, c: Tensor) -> dict[str, Tensor]:
        """sum c (da/dtheta)^2."""
        return {self._name: self._per_row(c.reshape(self.out), power=2).sum(0)}

    def cross(self, adjoint: Tensor) -> tuple[Tensor, Legs, Legs]:
        """2 g dw dx, entry by entry."""
        edges = self.layer.node.next_functions
        half = _Spread(self)
        return 2.0 * adjoint, ((edges[1 - self.way.slot], 1.0),), ((edges[self.way.slot], half),)

    def units(self) -> Tensor:
        """Entries of the parameter."""
        if self.way.index is not None:
            return self.way.index
        return torch.arange(self.shape.numel(), device=sizes(self.layer.node).device).reshape(self.shape)

    def gram(self, delta: Tensor) -> Tensor:
        """The sum that reaches the parameter, given back."""
        sums = spread(self._per_row(delta).reshape(self.rows, -1), self.fold, delta.reshape(self.rows, -1))
        back = self.way.push(sums, own_rows=self.own_rows)
        full = (1,) * (delta.ndim - len(self.shape)) + tuple(self.shape)
        return torch.zeros_like(delta).add_(self.scaled(back.reshape(-1, *full[1:])))

    def directions(self, parameters: Mapping[str, Tensor], count: int) -> Iterator[tuple[str, slice, Tangent]]:
        """Unit parameters, broadcast as the node broadcasts."""
        parameter = parameters[self._name]
        for low in range(0, parameter.numel(), count):
            high = min(low + count, parameter.numel())
            unit = self.way.units(low, high, parameter)
            unit = unit.reshape(-1, *(1,) * (len(self.out) - len(self.shape)), *self.shape)
            yield self._name, slice(low, high), Tangent(self.scaled(unit).expand(-1, *self.out))

    @property
    def _name(self) -> str:
        return self.layer.own[0]

    def gathered(self, seed: Tensor) -> Tensor:
        """[samples, *theta]: sums of what meets the parameter, unscaled."""
        return grouped(self._per_row(seed, scaled=False), self.fold)

    def _per_row(self, delta: Tensor, *, power: int = 1, scaled: bool = True) -> Tensor:
        """[rows, *theta]: what reaches the parameter from every row."""
        delta = self.scaled(delta, power) if scaled else delta
        full = (1,) * (delta.ndim - len(self.shape)) + tuple(self.shape)
        reduce = [axis for axis in range(1, delta.ndim) if full[axis] == 1]
        sums = delta.sum(reduce, keepdim=True) if reduce else delta
        return self.way.pull(sums, own_rows=self.own_rows, power=power)


class _Spread(Half):
    """dw as it meets x."""

    def __init__(self, of: Broadcast) -> None:
        self.of = of

    def push(self, tangents: Tensor) -> Tensor:
        return broadcast(tangents, self.of.out).expand(-1, *self.of.out)

    def pull(self, seed: Tensor) -> Tensor:
        return seed.sum_to_size(self.of.shape)

    def some(self, seed: Tensor, low: int, high: int) -> Tensor:
        return self.of.gathered(seed)[low:high]
