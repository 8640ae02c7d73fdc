"""Softmax, log-softmax and logsumexp over one axis, p the probabilities of a row, dz = dx - p.dx.

softmax     p_i'' = p_i (dz_i^2 - sum_j p_j dz_j^2): weights c = p (g - p.g) on dz
log-softmax y_i'' = -sum_j p_j dz_j^2:               weights c = -(sum g) p on dz
logsumexp   y''   =  sum_j p_j dz_j^2:               weights c = g p on dz

The seed u of dz goes back to x as u - p sum(u). Masked entries have p = c = 0.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hessdiag.graph import saved
from hessdiag.graph.kinds import Given
from hessdiag.graph.nodes import edge_shape
from hessdiag.graph.sites.site import Map, Site, SiteKind
from hessdiag.graph.tangents import Tangent

if TYPE_CHECKING:
    from hessdiag.graph.reading import Graph


class _Centred(Map):
    """dz = dx - p.dx, row by row."""

    def __init__(self, p: Tensor, dim: int) -> None:
        self.p, self.dim = p, dim  # counted from the end

    def push(self, tangents: Tensor) -> Tensor:
        return tangents - (self.p * tangents).sum(self.dim, keepdim=True)

    def pull(self, seed: Tensor) -> Tensor:
        return torch.addcmul(seed, self.p, seed.sum(self.dim, keepdim=True), value=-1.0)


class Rowwise(SiteKind):
    """Functions of rows whose second derivative is a weighted variance of dx."""

    @classmethod
    def match(cls, node: Any, graph: Graph) -> bool:
        """A row must not lie along the samples, where there are any."""
        axes = len(edge_shape(node.next_functions[0]))
        if graph.is_free(node):
            return axes > 0
        if axes < 2 or any(dim % axes == 0 for dim in saved.integers(node, "dim")):
            graph.refuse(node, f"a {cls.name} over the axis of the samples")
        return True

    @classmethod
    @abstractmethod
    def weights(cls, p: Tensor, adjoint: Tensor, dim: int) -> Tensor:
        """c of dz."""

    @classmethod
    @abstractmethod
    def probabilities(cls, node: Any) -> Tensor:
        """p, shaped like x."""

    @classmethod
    def sites(cls, node: Any, adjoint: Tensor, name: str) -> list[Site]:
        """One site of the shape of x."""
        p, dim = cls.probabilities(node), cls.dim(node)
        return [Site(name, cls.weights(p, adjoint, dim), ((node.next_functions[0], _Centred(p, dim)),))]

    @classmethod
    def dim(cls, node: Any) -> int:
        """The axis, counted from the end."""
        axes = len(edge_shape(node.next_functions[0]))
        return int(saved.integers(node, "dim")[0] % axes - axes)


class Softmax(Rowwise):
    """exp(x) / sum exp(x)."""

    name = "softmax"
    nodes = frozenset({"SoftmaxBackward0", "SafeSoftmaxBackward0"})

    @classmethod
    def probabilities(cls, node: Any) -> Tensor:
        """What it gave."""
        return saved.tensor(node, "result")

    @classmethod
    def weights(cls, p: Tensor, adjoint: Tensor, dim: int) -> Tensor:
        """p (g - p.g)."""
        return p * (adjoint - (p * adjoint).sum(dim, keepdim=True))

    @classmethod
    def returned(cls, node: Any, below: Tensor, name: str) -> list[Site]:
        """Its backward makes p (g - p.g), which a product of queries and keys below keeps as its adjoint, too."""
        edge = node.next_functions[0]
        return [Site(name, below, ((edge, _Centred(cls.probabilities(node), cls.dim(node))),))]

    @classmethod
    def move(cls, node: Any, shape: torch.Size, given: Sequence[Given]) -> Tangent | None:
        """p (dx - p.dx)."""
        p = saved.tensor(node, "result")
        return Tangent(p * _Centred(p, cls.dim(node)).push(given[0][2].dense(shape)))


class LogSoftmax(Rowwise):
    """x - log sum exp(x)."""

    name = "log-softmax"
    nodes = frozenset({"LogSoftmaxBackward0"})

    @classmethod
    def probabilities(cls, node: Any) -> Tensor:
        """Of what it gave."""
        return saved.tensor(node, "result").exp()

    @classmethod
    def weights(cls, p: Tensor, adjoint: Tensor, dim: int) -> Tensor:
        """-(sum g) p."""
        return -adjoint.sum(dim, keepdim=True) * p

    @classmethod
    def move(cls, node: Any, shape: torch.Size, given: Sequence[Given]) -> Tangent | None:
        """dx - p.dx."""
        return Tangent(_Centred(cls.probabilities(node), cls.dim(node)).push(given[0][2].dense(shape)))


class LogSumExp(Rowwise):
    """log sum exp(x) over one axis."""

    name = "logsumexp"
    nodes = frozenset({"LogsumexpBackward0"})

    @classmethod
    def match(cls, node: Any, graph: Graph) -> bool:
        """One axis."""
        if len(saved.integers(node, "dim")) != 1:
            graph.refuse(node, "a logsumexp over several axes")
        return super().match(node, graph)

    @classmethod
    def probabilities(cls, node: Any) -> Tensor:
        """exp(x - y)."""
        return (saved.tensor(node, "self") - cls._kept(node, saved.tensor(node, "result"))).exp()

    @classmethod
    def weights(cls, p: Tensor, adjoint: Tensor, dim: int) -> Tensor:
        """g p."""
        return (adjoint.unsqueeze(dim) if adjoint.ndim < p.ndim else adjoint) * p

    @classmethod
    def move(cls, node: Any, shape: torch.Size, given: Sequence[Given]) -> Tangent | None:
        """p.dx."""
        _, edge, tangent = given[0]
        moved = (cls.probabilities(node) * tangent.dense(edge_shape(edge))).sum(cls.dim(node))
        return Tangent(moved.reshape(len(moved), *shape))

    @classmethod
    def _kept(cls, node: Any, result: Tensor) -> Tensor:
        return result if saved.flag(node, "keepdim") else result.unsqueeze(cls.dim(node))
