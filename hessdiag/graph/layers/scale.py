"""A parameter that multiplies: a = w * x. G_n = delta_n x_n, summed over the axes on which w is broadcast.

x is the other factor; for PReLU, a = max(x, 0) + w min(x, 0), it is min(x, 0); for a choice by a mask the mask.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from hessdiag.graph import saved
from hessdiag.graph.layers.broadcast import Broadcast, own_slot
from hessdiag.graph.layers.layer import Layer
from hessdiag.graph.sites.site import Legs

if TYPE_CHECKING:
    from hessdiag.graph.reading import Graph


class Scale(Broadcast):
    """w * x, w / x for constant x, PReLU's slope, a parameter that a mask chooses."""

    name = "scale"
    nodes = frozenset({"MulBackward0", "DivBackward0", "PreluKernelBackward0", "WhereBackward0"})

    @classmethod
    def match(cls, node: Any, graph: Graph) -> list[Layer]:
        """One factor comes from a parameter, the other from none or from others; by a parameter nothing is divided."""
        found = own_slot(node, graph)
        for way in found:
            if node.name() == "DivBackward0" and (way.slot == 1 or graph.is_live(node.next_functions[1][0])):
                graph.refuse(node, f"a quotient of parameter {way.name!r}")
            if node.name() == "PreluKernelBackward0" and way.slot == 0:
                graph.refuse(node, f"PReLU of parameter {way.name!r} itself")
        return [Layer(cls, way.name, node, way.name, None, carried=way) for way in found]

    def read(self) -> None:
        """x."""
        super().read()
        node = self.layer.node
        if node.name() == "PreluKernelBackward0":
            self._x = saved.tensor(node, "self").clamp(max=0)
        elif node.name() == "WhereBackward0":
            chosen = saved.tensor(node, "condition")
            self._x = (chosen if self.way.slot == 0 else ~chosen).to(node._input_metadata[0].dtype)
        else:
            self._x = saved.constant(node, self.way.slot)

    def cross(self, adjoint: Tensor) -> tuple[Tensor, Legs, Legs]:
        """Of a product; of PReLU where x is below 0; a choice is not bilinear."""
        if self.layer.node.name() == "MulBackward0":
            return super().cross(adjoint)
        below = saved.tensor(self.layer.node, "self") < 0
        return super().cross(adjoint * below)

    @classmethod
    def crossing(cls, layer: Layer) -> bool:
        """A constant that is divided into the parameter and a mask hold no x."""
        return layer.node.name() in ("MulBackward0", "PreluKernelBackward0")

    def scaled(self, delta: Tensor, power: int = 1) -> Tensor:
        """da/dw = x."""
        return delta * self._x**power
