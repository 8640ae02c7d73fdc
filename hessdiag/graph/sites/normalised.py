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
class Scale:
    """1 / r [R, 1] of the rows of x, those of a sample together."""

    rate: Tensor
    centred: bool
    shape: torch.Size
    """Of x."""

    def by_rows(self, tangents: Tensor) -> Tensor:
        """[K, R, D] for [K, *shape]."""
        rows = len(self.rate)
        width = self.shape.numel() // max(rows, 1)
        return tangents.reshape(*tangents.shape[: tangents.ndim - len(self.shape)], rows, width)

    def slope(self, tangents: Tensor) -> Tensor:
        """w [K, R, D] for tangents [K, *shape]; its own transpose on cotangents [R, D] up to the shape."""
        w = self.by_rows(tangents) * self.rate
        return w - w.mean(-1, keepdim=True) if self.centred else w

    def back(self, w: Tensor) -> Tensor:
        """The transpose of `slope`."""
        w = w * self.rate
        return (w - w.mean(-1, keepdim=True) if self.centred else w).reshape(self.shape)


@dataclass(frozen=True)
class Rows(Scale):
    """y [R, D] besides, and `gain` shaped like it, None for 1."""

    y: Tensor
    gain: Tensor | None

    @property
    def scale(self) -> Scale:
        """What sites keep: y, and its unit vectors, are as large as x."""
        return Scale(self.rate, self.centred, self.shape)


class _Across(Map):
    """w less its parts along y and along g."""

    def __init__(self, scale: Scale, along: tuple[Tensor, Tensor]) -> None:
        self.of, self.along, self.rows = scale, along, len(scale.rate)

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
    """w along the eigenvectors in the plane of y and g, [R, 2].

    y and g are centred where x is, and so d(w along a vector of their plane)/dx is that vector over r.
    """

    def __init__(self, scale: Scale, along: tuple[Tensor, Tensor], vectors: Tensor) -> None:
        """`vectors` [R, 2, 2], a vector per column."""
        self.of, self.along, self.rows = scale, along, len(scale.rate)
        self._vectors = vectors * scale.rate[:, :, None]

    def push(self, tangents: Tensor) -> Tensor:
        w = self.of.by_rows(tangents)
        parts = torch.stack([(w * unit).sum(-1) for unit in self.along], -1)
        return (parts[..., None, :] @ self._vectors)[..., 0, :]

    def pull(self, seed: Tensor) -> Tensor:
        return self._joined((self._vectors @ seed[:, :, None])[:, :, 0]).reshape(self.of.shape)

    def squared(self, c: Tensor) -> Tensor:
        """Along each vector its entries, squared."""
        found = sum(self._joined(self._vectors[:, :, j]).square() * c[:, j : j + 1] for j in (0, 1))
        assert isinstance(found, Tensor)
        return found.reshape(self.of.shape)

    def _joined(self, parts: Tensor) -> Tensor:
        """Of the units, so much of each [R, 2]."""
        return torch.addcmul(self.along[0] * parts[:, :1], self.along[1], parts[:, 1:])


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
        y = y - y.mean(-1, keepdim=True) if rows.centred else y  # up to rounding it is
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
        across = (-big).expand(y.shape)
        values, vectors = turned(-3.0 * big * (1.0 - length.square() / count), -length * height / count, -big)
        edge, units = node.next_functions[0], (first, second)
        return [
            Site(f"{name} (across)", across, ((edge, _Across(rows.scale, units)),)),
            Site(f"{name} (along)", values[:, 0], ((edge, _Along(rows.scale, units, vectors[:, 0])),)),
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
        y = (x.reshape(-1, count) - mean.reshape(-1, 1)) * rate
        return Rows(rate, True, x.shape, y, None if gain is None else gain.reshape(1, -1))


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
        return Rows(rate, True, x.shape, y, gain)


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
        return Rows(rate, True, x.shape, y, None if gain is None else gain.reshape(-1, 1))
