"""A site: a tensor of scalar places where a computation bends, and what a kind of site must tell.

Along one parameter a node y = phi(u_1..u_m) adds <g, phi''(du, du)> to the second derivative, g its adjoint. A kind
writes that quadratic form as sites: sums of c dz^2, c a weight per entry and dz linear in the du of the node's inputs
(times a factor entry by entry, or by a `Map` that mixes entries of one sample); or sums of c dz dw with two such
combinations, where the form is a product of two (a pair). Most kinds need no more than second derivatives, entry by
entry: see `Pointwise`. Such sites are merged where all their inputs are functions of one tensor, entry by entry.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from hessdiag.graph.kinds import NodeKind
from hessdiag.graph.nodes import Edge, edge_shape

if TYPE_CHECKING:
    from hessdiag.graph.reading import Graph


class Map(ABC):
    """A linear map from the tensor of an edge to the entries of a site, which never mixes samples."""

    rows: int = 0
    """Into how many rows it cuts its edge, in order, entries of different rows never meeting; 0 where that is not said.
    With rows, `squared` must be given."""

    def squared(self, c: Tensor) -> Tensor:
        """sum_j c_j (dz_j/du_k)^2 for every entry k of the edge."""
        raise NotImplementedError

    @abstractmethod
    def push(self, tangents: Tensor) -> Tensor:
        """dz [K, *shape of c] for tangents [K, *shape of the edge]."""

    @abstractmethod
    def pull(self, seed: Tensor) -> Tensor:
        """Its transpose: a cotangent of the edge for a seed shaped like c; differentiable in the seed.

        What it returns may be written over, unless it is the seed's own memory.
        """


Legs = tuple[tuple[Edge, "float | Tensor | Map"], ...]
"""A linear combination: the sum over legs of factor * d(edge), or of map(d(edge))."""


@dataclass(frozen=True)
class Site:
    """A tensor of scalar sites: weights `c` on dz^2, dz along `legs`; or on dz dw with dw along `right` (a pair).

    `lam` balances the halves of a pair, (lam dz) (dw / lam): the sum is the same, its noise under signs is not.
    """

    name: str
    c: Tensor
    legs: Legs
    right: Legs = ()
    lam: float = 1.0

    @property
    def edges(self) -> list[Edge]:
        """Everything that the site looks at."""
        return [edge for edge, _ in (*self.legs, *self.right)]

    @property
    def plain(self) -> bool:
        """Whether dz is one tensor as it is."""
        return not self.right and len(self.legs) == 1 and isinstance(self.legs[0][1], float) and self.legs[0][1] == 1.0


def pulled(edge: Edge, factor: float | Tensor | Map, seed: Tensor) -> Tensor:
    """The cotangent of the edge of one leg for a seed on the entries of its site."""
    if isinstance(factor, Map):
        return factor.pull(seed)
    plain = isinstance(factor, float) and factor == 1.0
    return (seed if plain else seed * factor).sum_to_size(edge_shape(edge))


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

    @classmethod
    def outputs(cls, node: Any) -> tuple[int, ...]:
        """Numbers of the outputs in which it bends."""
        return (0,)

    @classmethod
    def returned(cls, node: Any, below: Tensor, name: str) -> list[Site]:
        """The same for `below`, the adjoint of its one input where nothing else takes that: for a kind whose weights
        are what its backward makes of its own adjoint.
        """
        raise NotImplementedError

    @classmethod
    def has_returned(cls) -> bool:
        """Whether the kind itself gives `returned`: one derived from it may have other weights."""
        return "returned" in vars(cls)

    @classmethod
    def written(cls, node: Any, adjoints: Mapping[int, Tensor], name: str) -> list[Site]:
        """The same, for the adjoints of those outputs."""
        return cls.sites(node, adjoints[0], name)


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


def turned(a: Tensor, b: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [..., 2] and eigenvectors [..., 2, 2] (one per column) of the matrices [[a, b], [b, d]]."""
    angle = 0.5 * torch.atan2(2.0 * b, a - d)
    cos, sin = angle.cos(), angle.sin()
    cross = 2.0 * b * cos * sin
    values = torch.stack([a * cos * cos + cross + d * sin * sin, a * sin * sin - cross + d * cos * cos], -1)
    return values, torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
