"""One forward pass becomes a list of sites: where the loss of a batch bends, and how much.

For a loss summed over the samples of a batch (mathematics: the site identity)

    H_kk = sum_n (df_n/dtheta_k)^T (d2l_n/df2) (df_n/dtheta_k) + sum_j c_j (dz_j/dtheta_k)^2,
    c_j = sigma''(z_j) dl/dh_j   at an elementwise node h = sigma(z).

A product h = a b of two activations adds 2 g da db, g = dl/dh; by polarisation two sites of opposite sign,
(g/2) ((lam da + db/lam)^2 - (lam da - db/lam)^2). Sites whose z are elementwise functions of one and the same tensor
u are merged into one on u, c_u = sum c_j (dz_j/du)^2 (and 2 g a'(u) b'(u) for a product): x * sigmoid(x) written out
costs no more than SiLU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ..errors import NonFiniteError
from ..objective import Objective
from ..persample import Curvature
from .direct import Direct, find_direct
from .elementwise import derivatives, is_elementwise
from .graph import Edge, Graph, Layer, detach_guard
from .nodes import Key, constant, edge_key, edge_shape


@dataclass(frozen=True)
class Site:
    """A tensor of scalar sites: weights `c` and the direction dz = sum over legs of factor * d(edge)."""

    name: str
    c: Tensor
    legs: tuple[tuple[Edge, float | Tensor], ...]
    product: int | None = None  # index of the product this half of a polarisation belongs to


class Linearisation:
    """One batch through the model: outputs, the loss's curvature at them, layers and sites, ready for passes.

    Holds the autograd graph; `backward` may be called any number of times. Weights are those of the loss *summed*
    over the batch; `weight` is what the batch adds to the divisor of the mean.
    """

    def __init__(
        self,
        objective: Objective,
        inputs: Any,
        targets: Tensor,
        *,
        index: int = 0,
        balance: Mapping[int, float] | None = None,
    ) -> None:
        with torch.enable_grad():
            self.outputs = objective.outputs(inputs, targets, index=index)
        detach_guard(self.outputs)
        self.objective = objective
        self.samples = len(targets)
        self.graph = Graph(self.outputs, objective.parameters)
        self.layers: list[Layer] = self.graph.layers
        with torch.no_grad():
            self.curvature: Curvature = objective.loss.curvature(self.outputs, targets)
            self.weight = float(objective.loss.weights(self.outputs, targets).sum())
        if not bool(torch.isfinite(self.curvature.loss).all()):
            raise NonFiniteError(f"batch {index}: the loss {objective.loss.name!r} is not finite; check the targets")
        self.balance = dict(balance or {})
        self.sites: list[Site] = self._find_sites(index)
        owners = {edge_key(site.legs[0][0]): n for n, site in enumerate(self.sites) if len(site.legs) == 1}
        self.direct: dict[int, Direct] = find_direct(self.graph, owners)

    @property
    def loss(self) -> float:
        """Loss summed over the batch."""
        return float(self.curvature.loss.sum())

    @property
    def bends(self) -> list[Any]:
        """The curved elementwise nodes, for reports that pair them with the layers that feed them."""
        return self.graph.curves

    def backward(
        self,
        seeds: Sequence[Tensor | None],
        output_seed: Tensor | None,
        targets: Sequence[GradientEdge | Tensor],
        *,
        create_graph: bool = False,
    ) -> tuple[Tensor | None, ...]:
        """One backward pass with many roots: sum_j seed_j dz_j/dt + output_seed . df/dt for every t in `targets`."""
        roots: list[Any] = []
        vectors: list[Tensor] = []
        for site, seed in zip(self.sites, seeds):
            if seed is None:
                continue
            for edge, factor in site.legs:
                roots.append(GradientEdge(*edge))
                plain = isinstance(factor, float) and factor == 1.0
                vectors.append((seed if plain else seed * factor).sum_to_size(edge_shape(edge)))
        if output_seed is not None:
            roots.append(self.outputs)
            vectors.append(output_seed.to(self.outputs.dtype).reshape(self.outputs.shape))
        if not roots:
            return (None,) * len(targets)
        wanted: Any = list(targets)
        found: tuple[Tensor | None, ...] = torch.autograd.grad(
            roots, wanted, vectors, retain_graph=True, allow_unused=True, create_graph=create_graph
        )
        return found

    def remote(self, place: int, cotangent: Tensor, seeds: Sequence[Tensor | None]) -> Tensor:
        """A layer's cotangent without what the seeds of the sites that it feeds directly put into it."""
        direct = self.direct.get(place)
        seed = None if direct is None else seeds[direct.site]
        if direct is None or seed is None:
            return cotangent
        return cotangent - seed.reshape(cotangent.shape) * direct.slope

    def adjoints(self, nodes: Sequence[Any]) -> list[Tensor]:
        """dl/dh for the outputs h of `nodes`, the loss summed over the batch."""
        if not nodes:
            return []
        gradient = self.curvature.gradient.to(self.outputs.dtype).reshape(self.outputs.shape)
        found = torch.autograd.grad(
            [self.outputs],
            [GradientEdge(node, 0) for node in nodes],
            [gradient],
            retain_graph=True,
            allow_unused=True,
        )
        return [
            torch.zeros(edge_shape((node, 0)), dtype=gradient.dtype, device=gradient.device) if g is None else g
            for node, g in zip(nodes, found)
        ]

    # -- construction

    def _find_sites(self, index: int) -> list[Site]:
        curves, products = self.graph.curves, self.graph.products
        adjoints = self.adjoints([*curves, *products])
        raw: list[tuple[str, Any, Tensor, list[Edge]]] = []
        with torch.no_grad():
            for node, adjoint in zip(curves, adjoints):
                second = derivatives(node)[1]
                assert second is not None
                c = second * adjoint
                if not bool(torch.isfinite(c).all()):
                    raise NonFiniteError(
                        f"batch {index}: {node.name()} {self.graph.place(node)} has NaN or Inf curvature"
                    )
                raw.append((self._name(node), node, c, [node.next_functions[0]]))
            for node, adjoint in zip(products, adjoints[len(curves) :]):
                raw.append((self._name(node), node, adjoint, list(node.next_functions)))
            return self._merge(raw, len(curves))

    def _merge(self, raw: list[tuple[str, Any, Tensor, list[Edge]]], curves: int) -> list[Site]:
        bases = [[self._base(edge) for edge in edges] for _, _, _, edges in raw]
        count: dict[Key, int] = {}
        for found in bases:
            for key in {edge_key(edge) for edge, _ in found}:
                count[key] = count.get(key, 0) + 1
        merged: dict[Key, tuple[str, Edge, Tensor]] = {}
        sites: list[Site] = []
        for position, ((name, _, c, edges), found) in enumerate(zip(raw, bases)):
            one_base = len({edge_key(edge) for edge, _ in found}) == 1
            if position >= curves and not one_base:
                sites += self._polarise(name, c, edges, position - curves)
                continue
            if position < curves and count[edge_key(found[0][0])] == 1:
                sites.append(Site(name, c, ((edges[0], 1.0),)))
                continue
            edge = found[0][0]
            slopes = [slope for _, slope in found]
            weight = c * slopes[0] * (slopes[0] if position < curves else 2 * slopes[1])
            if tuple(weight.shape) != tuple(edge_shape(edge)):
                sites += (
                    self._polarise(name, c, edges, position - curves)
                    if position >= curves
                    else [Site(name, c, ((edges[0], 1.0),))]
                )
                continue
            old = merged.get(edge_key(edge))
            merged[edge_key(edge)] = (
                name if old is None else old[0],
                edge,
                weight if old is None else old[2] + weight,
            )
        sites += [Site(name, c, ((edge, 1.0),)) for name, edge, c in merged.values()]
        return sites

    def _polarise(self, name: str, g: Tensor, edges: list[Edge], product: int) -> list[Site]:
        lam = self.balance.get(product, 1.0)
        a, b = edges
        return [
            Site(f"{name} (sum)", 0.5 * g, ((a, lam), (b, 1.0 / lam)), product),
            Site(f"{name} (difference)", -0.5 * g, ((a, lam), (b, -1.0 / lam)), product),
        ]

    def _base(self, edge: Edge) -> tuple[Edge, Tensor]:
        """Follow elementwise nodes and constant factors down from `edge`: the tensor u below and d(edge)/du."""
        slope = torch.ones((), dtype=self.outputs.dtype, device=self.outputs.device)
        shape = edge_shape(edge)
        while True:
            node = edge[0]
            step = self._slope(node)
            if step is None:
                return edge, slope
            below = node.next_functions[step[1]]
            if tuple(edge_shape(below)) != tuple(shape):
                return edge, slope
            slope, edge = slope * step[0], below

    def _slope(self, node: Any) -> tuple[Tensor | float, int] | None:
        """(derivative, which input) of a node that is an elementwise function of one live tensor."""
        if is_elementwise(node):
            return derivatives(node)[0], 0
        live = [slot for slot, (source, _) in enumerate(node.next_functions) if self.graph.is_live(source)]
        if len(live) != 1 or hasattr(node.next_functions[live[0]][0], "variable"):
            return None
        if any(layer.node is node for layer in self.layers):
            return None
        name = node.name()
        if name == "MulBackward0" or (name == "DivBackward0" and live[0] == 0):
            return constant(node, live[0]), live[0]
        if name in ("AddBackward0", "SubBackward0") and live[0] == 0:
            return 1.0, 0
        if name == "NegBackward0":
            return -1.0, 0
        return None

    def _name(self, node: Any) -> str:
        short = node.name().removesuffix("0").removesuffix("1").removesuffix("Backward")
        return f"{short} {self.graph.place(node)}"
