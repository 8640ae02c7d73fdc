"""A site: a tensor of scalar places where a computation bends, and what a kind of site must tell.

Along one parameter a node y = phi(u_1..u_m) adds sum_ij g (d2 phi / du_i du_j) du_i du_j to the second derivative, g
its adjoint. A kind writes that as sites, sum of c dz^2, c a weight per entry and z a linear combination of the inputs.
Most need no more than second derivatives, entry by entry: see `Pointwise`. Such sites are merged where all their inputs
are functions of one tensor, entry by entry.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from hessdiag.graph.kinds import NodeKind
from hessdiag.graph.nodes import Edge

if TYPE_CHECKING:
    from hessdiag.graph.reading import Graph


@dataclass(frozen=True)
class Site:
    """A tensor of scalar sites: weights `c` and the direction dz = sum over legs of factor * d(edge)."""

    name: str
    c: Tensor
    legs: tuple[tuple[Edge, float | Tensor], ...]
    product: int | None = None  # index of the product this half of a polarisation belongs to


class SiteKind(NodeKind, ABC):
    """Nodes that bend, whatever their form."""

    @classmethod
    def match(cls, node: Any, graph: Graph) -> bool:
        """Whether the kind answers for this node, given which of its inputs depend on parameters."""
        return True

    @classmethod
    def bends(cls, node: Any) -> bool:
        """False where the second derivative vanishes almost everywhere."""
        return True

    @classmethod
    @abstractmethod
    def sites(cls, node: Any, adjoint: Tensor, name: str) -> list[Site]:
        """The node's second-order term as sites, for dl/dy = `adjoint`."""


Pairs = Mapping[tuple[int, int], Tensor | float]
"""Second derivatives by pairs of input slots (i <= j); what is missing is zero."""


class Pointwise(SiteKind):
    """y = phi(u_1..u_m), entry by entry: `second` is all that a kind must give."""

    live_inputs: ClassVar[int]
    """m: how many inputs must depend on parameters. With fewer the node is of another kind."""

    @classmethod
    def match(cls, node: Any, graph: Graph) -> bool:
        """All m inputs depend on parameters."""
        return sum(graph.is_live(source) for source, _ in node.next_functions) == cls.live_inputs

    @classmethod
    @abstractmethod
    def second(cls, node: Any) -> Pairs:
        """d2 phi / du_i du_j at the node's inputs."""

    @classmethod
    def sites(cls, node: Any, adjoint: Tensor, name: str) -> list[Site]:
        """The form diagonalised entry by entry: one site per eigenvector, sum of v_i du_i, with its eigenvalue."""
        return apart({pair: second * adjoint for pair, second in cls.second(node).items()}, node, name)


def apart(form: Mapping[tuple[int, int], Tensor], node: Any, name: str) -> list[Site]:
    """Sites of a quadratic form in the inputs of one node, entry by entry."""
    slots = sorted({slot for pair in form for slot in pair})
    if len(slots) == 1:
        return [Site(name, form[slots[0], slots[0]], ((node.next_functions[slots[0]], 1.0),))]
    like = next(iter(form.values()))
    matrix = torch.zeros(*like.shape, len(slots), len(slots), dtype=torch.float64, device=like.device)
    for (i, j), value in form.items():
        a, b = slots.index(i), slots.index(j)
        matrix[..., a, b] = matrix[..., b, a] = value.double()
    values, vectors = torch.linalg.eigh(matrix)
    order = values.abs().argsort(-1, descending=True)  # a form of rank one is one site, whatever the signs
    values, vectors = values.gather(-1, order), vectors.gather(-1, order[..., None, :].expand_as(vectors))
    rounding = 8 * torch.finfo(like.dtype).eps * values.abs().amax(-1, keepdim=True)
    values = torch.where(values.abs() <= rounding, 0.0, values)
    return [
        Site(
            f"{name} ({number + 1})",
            values[..., number].to(like.dtype),
            tuple((node.next_functions[slot], vectors[..., k, number].to(like.dtype)) for k, slot in enumerate(slots)),
        )
        for number in range(len(slots))
        if bool(values[..., number].any())
    ]
