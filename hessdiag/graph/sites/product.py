"""A product y = a b of two tensors that both depend on parameters: 2 g da db, g the adjoint of y.

A pair: weights 2 g on da db. Where both are functions of one tensor, entry by entry, it is merged into a site of that.
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
        """One pair."""
        a, b = node.next_functions
        return [Site(name, 2.0 * adjoint, ((a, 1.0),), ((b, 1.0),))]

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
