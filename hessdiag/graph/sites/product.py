"""A product y = a b of two tensors that both depend on parameters: 2 g da db, g the adjoint of y.

By polarisation two sites of opposite sign, (g/2) ((lam da + db/lam)^2 - (lam da - db/lam)^2); lam balances the halves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hessdiag.graph import saved
from hessdiag.graph.kinds import Given
from hessdiag.graph.nodes import edge_shape
from hessdiag.graph.sites.site import Pairs, Pointwise, Site
from hessdiag.graph.tangents import Tangent, aligned, broadcast


class Product(Pointwise):
    """Two live factors; with one the node is affine."""

    name = "product"
    nodes = frozenset({"MulBackward0"})
    live_inputs = 2

    @classmethod
    def second(cls, node: Any) -> Pairs:
        """1 for the pair, 0 for either alone."""
        return {(0, 1): 1.0}

    @classmethod
    def sites(cls, node: Any, adjoint: Tensor, name: str) -> list[Site]:
        """Two halves with lam = 1."""
        return cls.halves(node, adjoint, name, 0, 1.0)

    @classmethod
    def halves(cls, node: Any, adjoint: Tensor, name: str, product: int, lam: float) -> list[Site]:
        """The two halves of product number `product`."""
        a, b = node.next_functions
        return [
            Site(f"{name} (sum)", 0.5 * adjoint, ((a, lam), (b, 1.0 / lam)), product),
            Site(f"{name} (difference)", -0.5 * adjoint, ((a, lam), (b, -1.0 / lam)), product),
        ]

    @classmethod
    def factor(cls, node: Any, slot: int) -> tuple[bool, Tensor | None]:
        """The other factor."""
        return True, aligned(saved.constant(node, slot), edge_shape((node, 0)))

    @classmethod
    def move(cls, node: Any, shape: torch.Size, given: Sequence[Given]) -> Tangent | None:
        """B da + a db."""
        total: Tensor | None = None
        for slot, edge, tangent in given:
            part = broadcast(tangent.dense(edge_shape(edge)), shape) * saved.constant(node, slot)
            total = part if total is None else total + part
        assert total is not None
        return Tangent(total)
