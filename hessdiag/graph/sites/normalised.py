"""Normalisation of rows of D features: LayerNorm, GroupNorm, InstanceNorm, and RMSNorm (which leaves the mean in).

y = z / r with z = x - mean(x) and r = sqrt(|z|^2 / D + eps). With w = (dx - mean(dx)) / r, g the adjoint of y less its
mean, and G = g.y,

    <g, y''(dx, dx)> = -(2/D) (g.w) (y.w) - (G/D) |w|^2 + (3 G/D^2) (y.w)^2,

in which eps is exact. On the unit vectors along y and along the rest of g (g less its part along y, of length h) it is

    [ -(3 G/D) (1 - |y|^2/D)   -|y| h/D ]
    [ -|y| h/D                 -G/D     ],

two sites by its eigenvectors; on everything orthogonal to both it is -G/D, one site of D entries.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hessdiag.graph import saved
from hessdiag.graph.kinds import Given
from hessdiag.graph.nodes import edge_shape
from hessdiag.graph.sites.site import Map, Site, SiteKind, turned
from hessdiag.graph.tangents import Tangent

if TYPE_CHECKING:
    from hessdiag.graph.reading import Graph


@dataclass(frozen=True)
class Rows:
    """y [R, D] and 1 / r [R, 1], the rows of a sample together; `gain` shaped like them, None for 1."""

    y: Tensor
    rate: Tensor
    gain: Tensor | None
    centred: bool
    shape: torch.Size
    """Of x."""

    def slope(self, tangents: Tensor) -> Tensor:
        """w [K, R, D] for tangents [K, *shape]; its own transpose on cotangents [R, D] up to the shape."""
        w = tangents.reshape(*tangents.shape[: tangents.ndim - len(self.shape)], *self.y.shape) * self.rate
        return w - w.mean(-1, keepdim=True) if self.centred else w

    def back(self, w: Tensor) -> Tensor:
        """The transpose of `slope`."""
        w = w * self.rate
        return (w - w.mean(-1, keepdim=True) if self.centred else w).reshape(self.shape)


class _Across(Map):
    """w less its parts along y and along g."""

    def __init__(self, rows: Rows, along: tuple[Tensor, Tensor]) -> None:
        self.of, self.along, self.rows = rows, along, len(rows.y)

    def push(self, tangents: Tensor) -> Tensor:
        return self._left(self.of.slope(tangents))

    def pull(self, seed: Tensor) -> Tensor:
        return self.of.back(self._left(seed))

    def squared(self, c: Tensor) -> Tensor:
        """c (1 - 1/D - y^2 - g^2) / r^2, y and g of length one; c is one number for each row."""
        left = 1.0 - sum(unit.square() for unit in self.along)
        if self.of.centred:
            left = left - 1.0 / c.shape[-1]
        return (c * left * self.of.rate.square()).reshape(self.of.shape)

    def _left(self, w: Tensor) -> Tensor:
        for unit in self.along:
            w = torch.addcmul(w, unit, (unit * w).sum(-1, keepdim=True), value=-1.0)
        return w


class _Along(Map):
    """w along the eigenvectors in the plane of y and g, [R, 2]."""

    def __init__(self, rows: Rows, along: tuple[Tensor, Tensor], vectors: Tensor) -> None:
        """`vectors` [R, 2, 2], a vector per column. What is kept is d(w along it)/dx: slope's transpose of each."""
        self.shape, self.rows = rows.shape, len(rows.y)
        self._first, self._second = (
            rows.back(along[0] * vectors[:, 0, j : j + 1] + along[1] * vectors[:, 1, j : j + 1]).reshape(rows.y.shape)
            for j in (0, 1)
        )

    def push(self, tangents: Tensor) -> Tensor:
        w = tangents.reshape(*tangents.shape[: tangents.ndim - len(self.shape)], *self._first.shape)
        return torch.stack([(w * row).sum(-1) for row in (self._first, self._second)], -1)

    def pull(self, seed: Tensor) -> Tensor:
        return torch.addcmul(self._first * seed[:, :1], self._second, seed[:, 1:]).reshape(self.shape)

    def squared(self, c: Tensor) -> Tensor:
        """Along each vector its entries, squared."""
        return torch.addcmul(self._first.square() * c[:, :1], self._second.square(), c[:, 1:]).reshape(self.shape)


class Normalised(SiteKind):
    """What normalisations share; gain and bias are a layer's (`hessdiag.graph.layers.gain`)."""

    @classmethod
    @abstractmethod
    def rows(cls, node: Any) -> Rows:
        """What the node computed."""

    @classmethod
    def match(cls, node: Any, graph: Graph) -> bool:
        """x depends on parameters, and nothing takes the statistics that the node gives beside its output."""
        if any(number for number in graph.outputs_in_use(node)):
            graph.refuse(node, "statistics of a normalisation that are used by themselves")
        return graph.is_live(node.next_functions[0][0])

    @classmethod
    def sites(cls, node: Any, adjoint: Tensor, name: str) -> list[Site]:
        """Everything across the plane of y and g, and the plane."""
        rows = cls.rows(node)
        y, count = rows.y, rows.y.shape[-1]
        g = adjoint.reshape(y.shape)
        g = g if rows.gain is None else g * rows.gain
        g = g - g.mean(-1, keepdim=True) if rows.centred else g
        length = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
        first = y / torch.where(length > 0, length, 1.0)
        along, size = (first * g).sum(-1, keepdim=True), torch.linalg.vector_norm(g, dim=-1, keepdim=True)
        rest = g - along * first
        rest = rest - (first * rest).sum(-1, keepdim=True) * first
        height = torch.linalg.vector_norm(rest, dim=-1, keepdim=True)
        height = torch.where(height > 32 * torch.finfo(y.dtype).eps * size, height, 0.0)  # else rounding, and no plane
        second = torch.where(height > 0, rest / torch.where(height > 0, height, 1.0), 0.0)
        big = along * length / count  # G/D
        across = (-big).expand(y.shape).contiguous()
        values, vectors = turned(-3.0 * big * (1.0 - length.square() / count), -length * height / count, -big)
        edge, units = node.next_functions[0], (first, second)
        return [
            Site(f"{name} (across)", across, ((edge, _Across(rows, units)),)),
            Site(f"{name} (along)", values[:, 0], ((edge, _Along(rows, units, vectors[:, 0])),)),
        ]

    @classmethod
    def move(cls, node: Any, shape: torch.Size, given: Sequence[Given]) -> Tangent | None:
        """gain (w - y (y.w) / D)."""
        if len(given) != 1 or given[0][0] != 0:
            return None
        rows = cls.rows(node)
        w = rows.slope(given[0][2].dense(edge_shape(given[0][1])))
        w = w - rows.y * ((rows.y * w).sum(-1, keepdim=True) / rows.y.shape[-1])
        return Tangent((w if rows.gain is None else w * rows.gain).reshape(len(w), *shape))


class LayerNorm(Normalised):
    """Over the last axes."""

    name = "layernorm"
    nodes = frozenset({"NativeLayerNormBackward0"})

    @classmethod
    def match(cls, node: Any, graph: Graph) -> bool:
        """Not over the samples."""
        if len(saved.integers(node, "normalized_shape")) >= len(edge_shape((node, 0))):
            graph.refuse(node, "a LayerNorm over the axis of the samples")
        return super().match(node, graph)

    @classmethod
    def rows(cls, node: Any) -> Rows:
        """x, mean and 1 / r are kept."""
        x, mean, rate = (saved.tensor(node, name) for name in ("input", "result1", "result2"))
        count = torch.Size(saved.integers(node, "normalized_shape")).numel()
        gain = saved.tensor_or_none(node, "weight")
        rate = rate.reshape(-1, 1)
        return Rows(
            (x.reshape(-1, count) - mean.reshape(-1, 1)) * rate,
            rate,
            None if gain is None else gain.reshape(1, -1),
            True,
            x.shape,
        )


class GroupNorm(Normalised):
    """Over the channels of a group and all pixels."""

    name = "groupnorm"
    nodes = frozenset({"NativeGroupNormBackward0"})

    @classmethod
    def rows(cls, node: Any) -> Rows:
        """x, means and 1 / r of every group are kept."""
        x, mean, rate = (saved.tensor(node, name) for name in ("input", "result1", "result2"))
        gain = saved.tensor_or_none(node, "weight")
        samples, groups = len(x), saved.integer(node, "group")
        rate = rate.reshape(-1, 1)
        if gain is not None:
            pixels = x[0, 0].numel()
            gain = gain.repeat_interleave(pixels).reshape(groups, -1).repeat(samples, 1)
        y = (x.reshape(samples * groups, -1) - mean.reshape(-1, 1)) * rate
        return Rows(y, rate, gain, True, x.shape)


class InstanceNorm(Normalised):
    """Over the pixels of every channel of every sample, without gain and bias: torch folds samples into channels."""

    name = "instancenorm"
    nodes = frozenset({"NativeBatchNormBackward0"})

    @classmethod
    def takes(cls, node: Any) -> bool:
        """One sample with statistics of its own: of a batch of one, the same."""
        return super().takes(node) and saved.flag(node, "training") and saved.tensor(node, "input").shape[0] == 1

    @classmethod
    def match(cls, node: Any, graph: Graph) -> bool:
        """Gains that are repeated for every sample are no layer known here."""
        for slot in (1, 2):
            if slot < len(node.next_functions) and graph.is_live(node.next_functions[slot][0]):
                graph.refuse(node, f"an instance normalisation with {graph.through(node.next_functions[slot][0])!r}")
        return super().match(node, graph)

    @classmethod
    def rows(cls, node: Any) -> Rows:
        """x, means and 1 / r of every channel are kept."""
        x, mean, rate = (saved.tensor(node, name) for name in ("input", "result1", "result2"))
        rate, gain = rate.reshape(-1, 1), saved.tensor_or_none(node, "weight")
        y = (x.reshape(len(rate), -1) - mean.reshape(-1, 1)) * rate
        return Rows(y, rate, None if gain is None else gain.reshape(-1, 1), True, x.shape)
