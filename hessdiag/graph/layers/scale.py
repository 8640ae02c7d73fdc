"""A parameter that multiplies: a = theta * x. G_n = delta_n x_n, summed over the axes on which theta is broadcast."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from hessdiag.graph import saved
from hessdiag.graph.layers.broadcast import Broadcast, own_slots
from hessdiag.graph.layers.layer import Layer

if TYPE_CHECKING:
    from hessdiag.graph.reading import Graph


class Scale(Broadcast):
    """theta * x for a theta of more than one entry: a single one is as a rule a slope or a temperature."""

    name = "scale"
    nodes = frozenset({"MulBackward0"})

    @classmethod
    def match(cls, node: Any, graph: Graph) -> Layer | None:
        """Theta must be one factor of two."""
        slots = own_slots(node, graph)
        if not slots:
            return None
        name = graph.direct(node, slots[0])
        assert name is not None
        if len(slots) > 1 or node.next_functions[slots[0]][0].variable.numel() == 1:
            graph.refuse(node, f"a learnable factor {name!r} (alpha of an activation, a temperature)")
        return Layer(cls, name, node, name, None)

    def read(self) -> None:
        """x."""
        super().read()
        self._x = saved.constant(self.layer.node, self.slot)

    def scaled(self, delta: Tensor, power: int = 1) -> Tensor:
        """da/dtheta = x."""
        return delta * self._x**power
