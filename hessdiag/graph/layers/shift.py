"""A parameter that is added: a = x + alpha w. G_n = alpha delta_n, summed over the axes on which w is broadcast."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from hessdiag.graph.affine import sign_of
from hessdiag.graph.layers.broadcast import Broadcast, own_slot
from hessdiag.graph.layers.layer import Layer

if TYPE_CHECKING:
    from hessdiag.graph.reading import Graph


class Shift(Broadcast):
    """x + w, x - w, w - x, with factors."""

    name = "shift"
    nodes = frozenset({"AddBackward0", "SubBackward0", "RsubBackward0"})

    @classmethod
    def match(cls, node: Any, graph: Graph) -> list[Layer]:
        """One summand comes from parameters."""
        return [Layer(cls, way.name, node, None, way.name, carried=way) for way in own_slot(node, graph)]

    def read(self) -> None:
        """The summand's factor."""
        super().read()
        self._alpha = sign_of(self.layer.node, self.way.slot)

    def scaled(self, delta: Tensor, power: int = 1) -> Tensor:
        """da/dw = alpha."""
        return delta if self._alpha == 1.0 else delta * self._alpha**power
