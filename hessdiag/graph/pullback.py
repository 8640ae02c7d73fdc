"""A node's own backward, and what that depends on: autograd's word on whether, and how, the node bends.

The pullback p = (dy/du)^T g of one node can be recorded in a graph of its own, which hangs on what the node saved: its
inputs u, or its output. Where p does not depend on u, the node is affine (almost everywhere) in u. Where it does,
dp/du is the node's Hessian contracted with g.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from hessdiag.errors import UncoveredModelError
from hessdiag.graph.nodes import Edge, edge_shape, sizes


def pullback(node: Any, seeds: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The node's own backward of one cotangent per output, one result for each of its inputs in the graph."""
    custom = getattr(node, "_forward_cls", None) is not None
    pulled = node.apply(*seeds) if custom else node(*seeds)
    found = pulled if isinstance(pulled, tuple) else (pulled,)
    if custom and len(found) != len(node.next_functions):  # it answers for arguments that are no tensors, too
        found = tuple(one for one in found if one is not None)
        wanted = [slot for slot, (source, _) in enumerate(node.next_functions) if source is not None]
        if len(found) != len(wanted):
            raise UncoveredModelError(
                f"{node.name()}: which of its gradients belongs to which input is not known; give its kind a `move`"
            )
        places = dict(zip(wanted, found))
        found = tuple(places.get(slot) for slot in range(len(node.next_functions)))
    return found


def random_like(shape: torch.Size, dtype: torch.dtype, device: torch.device, number: int) -> Tensor:
    """Normal numbers that depend on nothing but the shape, `number` and where they are drawn.

    On a GPU if they are wanted there: the processor takes seconds for a batch of attention weights.
    """
    place = device if device.type == "cuda" else torch.device("cpu")
    own: dict[str, Any] = {"generator": torch.Generator(device=place).manual_seed(0x5EED + number), "device": place}
    real = torch.float64 if dtype.is_complex else dtype
    drawn = torch.randn(shape, dtype=real, **own)
    if dtype.is_complex:
        drawn = torch.complex(drawn, torch.randn(shape, dtype=real, **own)).to(dtype)
    return drawn.to(device)


class Recorded:
    """The pullback of given cotangents, recorded once: `along` is its change along directions of its inputs."""

    def __init__(self, node: Any, seeds: Sequence[Tensor | None], slots: Sequence[int]) -> None:
        self.edges: list[Edge] = [node.next_functions[slot] for slot in slots]
        with torch.enable_grad():
            pulled = pullback(node, seeds)
            self._pulled = [
                None if p is None else p.sum_to_size(edge_shape(edge))
                for p, edge in zip((pulled[slot] for slot in slots), self.edges)
            ]

    def along(self, vectors: Sequence[Tensor]) -> list[Tensor | None]:
        """The derivative of sum over slots of <p, v> with respect to every input: H v, H being symmetric.

        None throughout: p does not depend on the inputs, whatever their values.
        """
        pairs = [(p, v) for p, v in zip(self._pulled, vectors) if p is not None and p.requires_grad]
        if not pairs:
            return [None] * len(self.edges)
        found = torch.autograd.grad(
            [p for p, _ in pairs],
            [GradientEdge(*edge) for edge in self.edges],
            [v for _, v in pairs],
            retain_graph=True,
            allow_unused=True,
        )
        return [None if f is None else f.detach() for f in found]

    def answers(self, seeds: Sequence[Tensor | None]) -> None:
        """Raise what autograd raises where p has no derivative in its cotangents: no tangent passes the node then."""
        own = [seed for seed in seeds if seed is not None]
        pulled = [p for p in self._pulled if p is not None and p.requires_grad]
        if pulled:
            ones = [torch.ones_like(p) for p in pulled]
            torch.autograd.grad(pulled, own, ones, retain_graph=True, allow_unused=True)

    def random(self, number: int) -> list[Tensor]:
        """Directions for every input."""
        return [
            random_like(edge_shape(edge), meta.dtype, meta.device, 16 * number + place)
            for place, (edge, meta) in enumerate((edge, sizes(*edge)) for edge in self.edges)
        ]
