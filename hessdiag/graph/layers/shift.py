"""A parameter that is added: a = x + theta. G_n = delta_n, summed over the axes on which theta is broadcast."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from hessdiag.graph import saved
from hessdiag.graph.layers.broadcast import Broadcast, own_slots
from hessdiag.graph.layers.layer import Layer

if TYPE_CHECKING:
    from hessdiag.graph.reading import Graph


class Shift(Broadcast):
    """x + theta, theta + x, theta - x."""

    name = "shift"
    nodes = frozenset({"AddBackward0", "SubBackward0"})

    @classmethod
    def match(cls, node: Any, graph: Graph) -> Layer | None:
        """Theta must be added as it is, neither scaled nor subtracted."""
        slots = own_slots(node, graph)
        if not slots:
            return None
        name = graph.direct(node, slots[0])
        assert name is not None
        if len(slots) > 1:
            graph.refuse(node, f"a learnable factor {name!r} (alpha of an activation, a temperature)")
        if saved.number(node, "alpha", 1.0) != 1:
            graph.refuse(node, f"parameter {name!r} in a scaled sum")
        if node.name() == "SubBackward0" and slots[0] == 1:
            graph.refuse(node, f"parameter {name!r} subtracted")
        return Layer(cls, name, node, None, name)

    def scaled(self, delta: Tensor, power: int = 1) -> Tensor:
        """As it is: da/dtheta = 1."""
        return delta
