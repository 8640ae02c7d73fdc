"""Parameters that are added or multiplied elementwise: sums over the axes on which they are broadcast."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hessdiag.errors import UncoveredModelError
from hessdiag.graph.chunks import grouped, spread
from hessdiag.graph.layers.layer import LayerKind, Parts
from hessdiag.graph.nodes import is_leaf
from hessdiag.graph.tangents import Tangent

if TYPE_CHECKING:
    from hessdiag.graph.reading import Graph


def own_slots(node: Any, graph: Graph) -> list[int]:
    """Inputs of the node that are chosen parameters themselves."""
    return [slot for slot, (source, _) in enumerate(node.next_functions) if is_leaf(source) and graph.is_live(source)]


class Broadcast(LayerKind):
    """a = x (.) theta entry by entry, theta broadcast: over the samples at the least."""

    sole = False

    @abstractmethod
    def scaled(self, delta: Tensor, power: int = 1) -> Tensor:
        """Delta (da/dtheta)^power, before any sum."""

    def read(self) -> None:
        """Which input is the parameter, and its shape."""
        node = self.layer.node
        self.slot = next(slot for slot, (source, _) in enumerate(node.next_functions) if is_leaf(source))
        self.shape: torch.Size = node.next_functions[self.slot][0].variable.shape

    def per_group(self, delta: Tensor, group: int, *, squares: bool) -> Parts:
        """Of what reaches the parameter, summed where it was broadcast."""
        yield self._name, iter([self._summed(delta, group)])

    def weighted(self, c: Tensor) -> dict[str, Tensor]:
        """sum c (da/dtheta)^2."""
        return {self._name: self._summed(c.reshape(self.out), 1, power=2).sum(0)}

    def gram(self, delta: Tensor) -> Tensor:
        """The sum that reaches the parameter, given back."""
        return torch.zeros_like(delta).add_(self.scaled(spread(self._row_sums(delta), self.fold, delta)))

    def directions(self, parameters: Mapping[str, Tensor], count: int) -> Iterator[tuple[str, slice, Tangent]]:
        """Unit parameters, broadcast as the node broadcasts."""
        parameter = parameters[self._name]
        self._check(len(self.out))
        size = parameter.numel()
        for low in range(0, size, count):
            high = min(low + count, size)
            unit = torch.zeros(high - low, size, dtype=parameter.dtype, device=parameter.device)
            rows = torch.arange(high - low, device=unit.device)
            unit[rows, rows + low] = 1
            unit = unit.reshape(-1, *(1,) * (len(self.out) - parameter.ndim), *parameter.shape)
            yield self._name, slice(low, high), Tangent(self.scaled(unit).expand(-1, *self.out))

    @property
    def _name(self) -> str:
        return self.layer.own[0]

    def _check(self, axes: int) -> None:
        if axes < 1 or (len(self.shape) == axes and self.shape[0] != 1):
            raise UncoveredModelError(
                f"parameter {self._name!r} of shape {list(self.shape)} does not broadcast over the samples"
            )

    def _summed(self, delta: Tensor, group: int, *, power: int = 1) -> Tensor:
        per_row = self._row_sums(delta, power=power)
        return grouped(per_row.reshape(self.rows, *self.shape), group * self.fold)

    def _row_sums(self, delta: Tensor, *, power: int = 1) -> Tensor:
        """[rows, ...]: what reaches the parameter, summed where it was broadcast."""
        delta = self.scaled(delta, power)
        self._check(delta.ndim)
        full = (1,) * (delta.ndim - len(self.shape)) + tuple(self.shape)
        reduce = [axis for axis in range(1, delta.ndim) if full[axis] == 1]
        return delta.sum(reduce, keepdim=True) if reduce else delta
