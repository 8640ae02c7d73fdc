"""A parameter handed to every sample as it is, a = w: class tokens, learned queries, mask tokens.

Its node is the last on the parameter's way, and has rows for all samples; what takes them is any node at all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from hessdiag.graph.layers.broadcast import Broadcast
from hessdiag.graph.layers.layer import Layer

if TYPE_CHECKING:
    from hessdiag.graph.reading import Graph


class Source(Broadcast):
    """Found by what takes w, when no kind of layer claims it there."""

    name = "source"
    nodes: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def match(cls, node: Any, graph: Graph) -> Layer | None:
        """None by itself."""
        return None

    def scaled(self, delta: Tensor, power: int = 1) -> Tensor:
        """da/dw = 1."""
        return delta
