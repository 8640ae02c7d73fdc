"""The Euclidean norm r = |x| of rows: r'' = (|dx|^2 - (y.dx)^2) / r with y = x / r.

A site of weights g / r on dz = dx - y (y.dx).
Rows of length zero have no derivative; torch gives them none, and their weights are zero.
"""

from __future__ import annotations

import math
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


class _Across(Map):
    """dz = dx - y (y.dx)."""

    def __init__(self, y: Tensor, dims: tuple[int, ...]) -> None:
        self.y, self.dims = y, dims  # counted from the end

    def push(self, tangents: Tensor) -> Tensor:
        return tangents - self.y * (self.y * tangents).sum(self.dims, keepdim=True)

    def pull(self, seed: Tensor) -> Tensor:
        return self.push(seed)


class Length(SiteKind):
    """Norms of order 2."""

    name = "length"
    nodes = frozenset({"LinalgVectorNormBackward0", "NormBackward0", "NormBackward1"})

    @classmethod
    def match(cls, node: Any, graph: Graph) -> bool:
        """Of order 2, and not over the axis of the samples, where there are any."""
        axes, dims = len(edge_shape(node.next_functions[0])), saved.integers(node, "dim")
        return cls._euclidean(node) and (graph.is_free(node) or (bool(dims) and all(dim % axes for dim in dims)))

    @classmethod
    def sites(cls, node: Any, adjoint: Tensor, name: str) -> list[Site]:
        """One site of the shape of x."""
        y, rate, dims = cls._read(node)
        c = (rate * adjoint.reshape(rate.shape)).expand(y.shape).contiguous()
        return [Site(name, c, ((node.next_functions[0], _Across(y, dims)),))]

    @classmethod
    def move(cls, node: Any, shape: torch.Size, given: Sequence[Given]) -> Tangent | None:
        """y.dx."""
        if not cls._euclidean(node):
            return None
        _, edge, tangent = given[0]
        y, _, dims = cls._read(node)
        moved = (y * tangent.dense(edge_shape(edge))).sum(dims)
        return Tangent(moved.reshape(len(moved), *shape))

    @classmethod
    def _euclidean(cls, node: Any) -> bool:
        return saved.number_or_none(node, "ord" if saved.has(node, "ord") else "p") in (None, 2)

    @classmethod
    def _read(cls, node: Any) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        """(x / r, 1 / r with the axes kept, the axes); zero where r is."""
        x = saved.tensor(node, "self")
        dims = tuple(dim % x.ndim - x.ndim for dim in saved.integers(node, "dim") or range(x.ndim))
        kept = [1 if axis - x.ndim in dims else size for axis, size in enumerate(x.shape)]
        r = saved.tensor(node, "result").reshape(kept)
        rate = torch.where(r > 0, r, math.inf).reciprocal()
        return x * rate, rate, dims
