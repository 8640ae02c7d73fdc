"""A quotient y = a / b whose denominator depends on parameters.

y'' = -(2 / b) db (da - y db) / b: a pair with weights -2 g / b^2 on db and da - y db.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hessdiag.graph import saved
from hessdiag.graph.kinds import Given
from hessdiag.graph.nodes import edge_shape
from hessdiag.graph.sites.site import Pairs, Pointwise, Site
from hessdiag.graph.tangents import Tangent, broadcast

if TYPE_CHECKING:
    from hessdiag.graph.reading import Graph


class Quotient(Pointwise):
    """A live denominator; with a constant one the node is affine."""

    name = "quotient"
    nodes = frozenset({"DivBackward0"})
    live_inputs = 2

    @classmethod
    def match(cls, node: Any, graph: Graph) -> bool:
        """The numerator may be a constant."""
        return len(node.next_functions) > 1 and graph.is_live(node.next_functions[1][0])

    @classmethod
    def second(cls, node: Any) -> Pairs:
        """-1 / b^2 for the mixed pair, 2 a / b^3 for the denominator alone."""
        a, b = saved.tensor(node, "self"), saved.tensor(node, "other")
        alone = {(1, 1): 2.0 * a / b**3}
        if node.next_functions[0][0] is None:
            return alone
        return alone | {(0, 1): -b.square().reciprocal().expand(edge_shape((node, 0)))}

    @classmethod
    def sites(cls, node: Any, adjoint: Tensor, name: str) -> list[Site]:
        """One pair; with a constant numerator one site."""
        a, b = saved.tensor(node, "self"), saved.tensor(node, "other")
        top, bottom = node.next_functions
        if top[0] is None:
            return [Site(name, 2.0 * adjoint * a / b**3, ((bottom, 1.0),))]
        return [Site(name, -2.0 * adjoint / b.square(), ((bottom, 1.0),), ((top, 1.0), (bottom, -a / b)))]

    @classmethod
    def move(cls, node: Any, shape: torch.Size, given: Sequence[Given]) -> Tangent | None:
        """(da - y db) / b."""
        if any(slot for slot, _, _ in given):
            a, b = saved.tensor(node, "self"), saved.tensor(node, "other")
            total: Tensor | None = None
            for slot, edge, tangent in given:
                part = broadcast(tangent.dense(edge_shape(edge)), shape)
                part = part / b if slot == 0 else part * (-a / b.square())
                total = part if total is None else total + part
            assert total is not None
            return Tangent(total.expand(-1, *shape))
        return None
