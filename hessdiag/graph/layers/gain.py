"""Gain and bias of a normalisation over features: a = gain y + bias, y the normalised x (see `sites.normalised`).

G_n = sum over positions of delta y for the gain, of delta for the bias. The node bends in x, too: it is a site besides.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from hessdiag.graph import saved
from hessdiag.graph.layers.layer import Half, Layer, LayerKind
from hessdiag.graph.nodes import edge_shape
from hessdiag.graph.sites.normalised import GroupNorm, LayerNorm, Normalised, Rows
from hessdiag.graph.sites.site import Legs, Map
from hessdiag.graph.tangents import Tangent

if TYPE_CHECKING:
    from hessdiag.graph.reading import Graph


class Gain(LayerKind):
    """What gains share; where an entry of a parameter is used differs."""

    sole = False
    bends = True
    always_audited = False
    normalises = True
    site: ClassVar[type[Normalised]]

    @classmethod
    def match(cls, node: Any, graph: Graph) -> Layer | None:
        """Gain and bias must be the parameters themselves."""
        weight, bias = (graph.direct(node, slot) for slot in (1, 2))
        return Layer(cls, graph.layer_name(weight, bias), node, weight, bias) if weight or bias else None

    @classmethod
    def enters(cls, node: Any, graph: Graph) -> bool:
        """A constant x."""
        return not graph.is_live(node.next_functions[0][0])

    def read(self) -> None:
        """y."""
        self._y = self.site.rows(self.layer.node).y.reshape(self.out) if self.layer.weight else None

    @abstractmethod
    def owned(self, rows: Tensor) -> Tensor:
        """[..., *out] -> [..., samples, entries of a parameter]: sums over the positions of each sample."""

    @abstractmethod
    def placed(self, unit: Tensor) -> Tensor:
        """[K, entries of a parameter] as it meets [*out]."""

    def each(self, delta: Tensor) -> dict[str, Tensor]:
        """Gradients of single samples."""
        out = {}
        if self.layer.weight:
            assert self._y is not None
            out[self.layer.weight] = self._shaped(self.owned(delta * self._y), self.layer.weight)
        if self.layer.bias:
            out[self.layer.bias] = self._shaped(self.owned(delta), self.layer.bias)
        return out

    def weighted(self, c: Tensor) -> dict[str, Tensor]:
        """sum c y^2 and sum c."""
        c, out = c.reshape(self.out), {}
        if self.layer.weight:
            assert self._y is not None
            out[self.layer.weight] = self._shaped(self.owned(c * self._y.square()), self.layer.weight).sum(0)
        if self.layer.bias:
            out[self.layer.bias] = self._shaped(self.owned(c), self.layer.bias).sum(0)
        return out

    def directions(self, parameters: Mapping[str, Tensor], count: int) -> Iterator[tuple[str, slice, Tangent]]:
        """y or 1 where the parameter meets it."""
        for name, factor in ((self.layer.weight, self._y), (self.layer.bias, None)):
            if not name:
                continue
            parameter = parameters[name]
            for low in range(0, parameter.numel(), count):
                high = min(low + count, parameter.numel())
                unit = torch.zeros(high - low, parameter.numel(), dtype=parameter.dtype, device=parameter.device)
                unit[torch.arange(high - low), torch.arange(low, high)] = 1
                seed = self.placed(unit)
                yield name, slice(low, high), Tangent((seed if factor is None else seed * factor).expand(-1, *self.out))

    def cross(self, adjoint: Tensor) -> tuple[Tensor, Legs, Legs]:
        """2 g dgain dy."""
        node = self.layer.node
        rows = self.site.rows(node)
        slope = _Slope(rows, self.out)
        return 2.0 * adjoint, ((node.next_functions[0], slope),), ((node.next_functions[1], _Gain(self)),)

    def _shaped(self, sums: Tensor, name: str) -> Tensor:
        slot = 1 if name == self.layer.weight else 2
        return sums.reshape(len(sums), *edge_shape(self.layer.node.next_functions[slot]))


class LayerGain(Gain):
    """Of LayerNorm: one entry for each feature."""

    name = "layer gain"
    nodes = LayerNorm.nodes
    site = LayerNorm

    def owned(self, rows: Tensor) -> Tensor:
        """Over all but the features."""
        return rows.reshape(self.samples, -1, torch.Size(self._axes()).numel()).sum(1)

    def placed(self, unit: Tensor) -> Tensor:
        """Features are the last axes."""
        axes = self._axes()
        return unit.reshape(len(unit), *(1,) * (len(self.out) - len(axes)), *axes)

    def _axes(self) -> tuple[int, ...]:
        return saved.integers(self.layer.node, "normalized_shape")


class GroupGain(Gain):
    """Of GroupNorm: one entry for each channel."""

    name = "group gain"
    nodes = GroupNorm.nodes
    site = GroupNorm

    def owned(self, rows: Tensor) -> Tensor:
        """Over pixels, and over the rows of a sample."""
        return rows.reshape(self.samples, self.fold, self.out[1], -1).sum((1, 3))

    def placed(self, unit: Tensor) -> Tensor:
        """Channels are the second axis."""
        return unit.reshape(len(unit), 1, -1, *(1,) * (len(self.out) - 2))


class _Slope(Map):
    """dy = w - y (y.w) / D."""

    def __init__(self, rows: Rows, shape: torch.Size) -> None:
        self.of, self.shape = rows, shape

    def push(self, tangents: Tensor) -> Tensor:
        return self._across(self.of.slope(tangents)).reshape(-1, *self.shape)

    def pull(self, seed: Tensor) -> Tensor:
        return self.of.back(self._across(seed.reshape(self.of.y.shape)))

    def _across(self, w: Tensor) -> Tensor:
        return w - self.of.y * ((self.of.y * w).sum(-1, keepdim=True) / self.of.y.shape[-1])


class _Gain(Half):
    """A feature's gain wherever it is met."""

    def __init__(self, of: Gain) -> None:
        self.of, self.shape = of, edge_shape(of.layer.node.next_functions[1])

    def push(self, tangents: Tensor) -> Tensor:
        return self.of.placed(tangents.flatten(1)).expand(-1, *self.of.out)

    def pull(self, seed: Tensor) -> Tensor:
        return self.of.owned(seed).sum(0).reshape(self.shape)

    def some(self, seed: Tensor, low: int, high: int) -> Tensor:
        return self.of.owned(seed)[low:high].reshape(-1, *self.shape)
