"""A product of two matrices that both depend on parameters, Y = A B for every matrix of a batch: q k^T, attention times
values.

The form is 2 sum_nm g_nm sum_k dA_nk dB_km, G = (g_nm) the adjoint: pairs over (n, k) of lam_n dA_nk and
(G dB^T)_nk / lam_n, lam_n = |g_n|^(1/2) for the rows g_n of G, so that both halves are of one size row by row; a row
without adjoint has no weight. Or the same by columns: pairs over (k, m) of (dA^T G)_km / lam_m and lam_m dB_km.
Whichever draws fewer signs is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hessdiag.graph import saved
from hessdiag.graph.kinds import Given
from hessdiag.graph.nodes import edge_shape
from hessdiag.graph.sites.site import Map, Site, SiteKind
from hessdiag.graph.tangents import Tangent, broadcast

if TYPE_CHECKING:
    from hessdiag.graph.reading import Graph

_SLOTS: dict[str, tuple[int, int, str, str]] = {
    "BmmBackward0": (0, 1, "self", "mat2"),
    "BaddbmmBackward0": (1, 2, "batch1", "batch2"),
    "MmBackward0": (0, 1, "self", "mat2"),
    "AddmmBackward0": (1, 2, "mat1", "mat2"),
}
"""Input slots of A and B, and the names under which they are kept."""


class _OfRight(Map):
    """dB [.., k, m] -> R G dB^T [.., n, k], R = diag(1 / lam). G is kept as it is: a softmax below has it as its c."""

    def __init__(self, g: Tensor, rate: Tensor) -> None:
        self.g, self.rate = g, rate

    def push(self, tangents: Tensor) -> Tensor:
        return (self.g @ tangents.transpose(-1, -2)) * self.rate

    def pull(self, seed: Tensor) -> Tensor:
        return (seed * self.rate).transpose(-1, -2) @ self.g


class _OfLeft(Map):
    """dA [.., n, k] -> dA^T G R [.., k, m]."""

    def __init__(self, g: Tensor, rate: Tensor) -> None:
        self.g, self.rate = g, rate

    def push(self, tangents: Tensor) -> Tensor:
        return (tangents.transpose(-1, -2) @ self.g) * self.rate

    def pull(self, seed: Tensor) -> Tensor:
        return self.g @ (seed * self.rate).transpose(-1, -2)


class Bilinear(SiteKind):
    """Batched products of matrices with both factors live."""

    name = "bilinear"
    nodes = frozenset(_SLOTS)

    @classmethod
    def match(cls, node: Any, graph: Graph) -> bool:
        """Both factors live; with one the node is affine."""
        left, right, _, _ = _SLOTS[node.name()]
        return all(graph.is_live(node.next_functions[slot][0]) for slot in (left, right))

    @classmethod
    def sites(cls, node: Any, adjoint: Tensor, name: str) -> list[Site]:
        """One tensor of pairs."""
        left, right, _, _ = _SLOTS[node.name()]
        a, b = node.next_functions[left], node.next_functions[right]
        alpha = saved.number(node, "alpha", 1.0)
        g = adjoint if alpha == 1.0 else adjoint * alpha
        (n, k), m = edge_shape(a)[-2:], edge_shape(b)[-1]
        by_rows = n <= m
        size = torch.linalg.vector_norm(g, dim=-1 if by_rows else -2, keepdim=True)
        lam, live = size.sqrt(), size > 0
        rate = torch.where(live, lam, 1.0).reciprocal()
        if by_rows:
            c = (2.0 * live.to(g.dtype)).expand(*g.shape[:-1], k)
            return [Site(name, c, ((a, lam),), ((b, _OfRight(g, rate)),))]
        c = (2.0 * live.to(g.dtype)).expand(*g.shape[:-2], k, m)
        return [Site(name, c, ((a, _OfLeft(g, rate)),), ((b, lam),))]

    @classmethod
    def move(cls, node: Any, shape: torch.Size, given: Sequence[Given]) -> Tangent | None:
        """dA B + A dB, and what a baddbmm adds to it."""
        left, right, kept_left, kept_right = _SLOTS[node.name()]
        alpha, total = saved.number(node, "alpha", 1.0), None
        for slot, edge, tangent in given:
            value = tangent.dense(edge_shape(edge))
            if slot == left:
                part = alpha * (value @ saved.tensor(node, kept_right))
            elif slot == right:
                part = alpha * (saved.tensor(node, kept_left) @ value)
            else:
                part = saved.number(node, "beta", 1.0) * broadcast(value, shape)
            total = part if total is None else total + part
        return None if total is None else Tangent(total.expand(-1, *shape))

    @classmethod
    def fan(cls, node: Any) -> int:
        """Entries that one entry of the product sums over."""
        left = _SLOTS[node.name()][0]
        source = node.next_functions[left]
        return int(edge_shape(source)[-1]) if source[0] is not None else 1
