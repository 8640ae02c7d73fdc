"""Exact diagonals of chains: linear layers on vectors with nothing but elementwise operations between them.

For a^(l) = W_l h^(l-1) + b_l, h^(l) = sigma(a^(l)) and one sample, the functional Hessian H^(l) with respect
to a^(l) obeys

    H^(l) = diag(c^(l)) + diag(sigma') W_{l+1}^T H^(l+1) W_{l+1} diag(sigma'),   H = 0 above the outputs,

c^(l) = sigma''(a^(l)) dl/dh^(l) (the exact form of E[27], which keeps pairs of equal paths only). Its
diagonal q^(l) gives H_kk = sum_n q_na x_nb^2 for the weight W_ab. No matrix appears before it must: one level
below a diagonal, the diagonal is (c W^2) sigma'^2. Further down H is carried either as rows, H = B^T diag(w)
B with B the derivatives of the sites above, or as a full matrix, whichever costs less from there on. The
Gauss-Newton part keeps its few columns apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from hessdiag.graph import Layer, Linearisation, Site, edge_shape
from hessdiag.graph.kinds import NodeKind
from hessdiag.graph.layers import LayerKind
from hessdiag.graph.layers.linear import Linear, input_edge, is_plain, matrix
from hessdiag.graph.moves import kinds_of
from hessdiag.graph.nodes import Edge, is_leaf, sizes
from hessdiag.graph.sites import Map, Pointwise
from hessdiag.graph.sites.elementwise import derivatives, is_elementwise
from hessdiag.graph.sites.site import Legs

_NAMES = ("Add", "Sub", "Rsub", "Mul", "Div", "Neg", "Alias", "Clone", "View", "UnsafeView", "ReshapeAlias")
_POINTWISE = frozenset(f"{name}Backward{number}" for name in _NAMES for number in (0, 1))
CACHED = 1 << 23  # bytes of rows worked on at once, about what a processor keeps close
Rows = tuple[Tensor, Tensor]  # B [N, R, n] and w [N, R]


@dataclass(frozen=True)
class Level:
    """One linear map of a chain: a = x W^T + b, then h = a function of a, entry by entry, with slope dh/da."""

    node: Any
    layer: Layer | None
    weight: Tensor
    slope: Tensor | None
    c: Tensor | None

    @property
    def width(self) -> int:
        """Entries of a."""
        return self.weight.shape[0]


def find_chain(batch: Linearisation) -> list[Level] | None:
    """The levels of a chain from the first linear layer to the outputs, looked for once; None for any other network."""
    if "chain" not in batch.kept:
        batch.kept["chain"] = _read_chain(batch)
    found: list[Level] | None = batch.kept["chain"]
    return found


def _read_chain(batch: Linearisation) -> list[Level] | None:
    if batch.shared:
        return None
    graph, segment = batch.graph, dict[int, int]()
    maps: list[Any] = []
    for node in graph.nodes:
        if not graph.is_live(node) or is_leaf(node):
            continue
        sources = [edge for edge in node.next_functions if graph.is_live(edge[0]) and not is_leaf(edge[0])]
        if not sources and node.name() == "TBackward0":
            continue  # a weight on its way to its layer
        below = {segment[id(edge[0])] for edge in sources if id(edge[0]) in segment}
        shape = edge_shape((node, 0))
        if len(shape) != 2 or shape[0] != batch.samples:
            return None
        if Linear.takes(node):
            if below != ({len(maps) - 1} if maps else set()) or not is_plain(node):
                return None
            segment[id(node)] = len(maps)
            maps.append(node)
            continue
        known = node.name() in _POINTWISE or any(_is_pointwise(kind) for kind in kinds_of(node))
        if not known or len(below) != 1 or any(tuple(edge_shape(edge)) != tuple(shape) for edge in sources):
            return None
        segment[id(node)] = below.pop()
    layers = {id(layer.node): layer for layer in batch.layers}
    if not maps or set(layers) - {id(node) for node in maps} or segment.get(id(batch.outputs.grad_fn)) != len(maps) - 1:
        return None
    return _levels(batch, maps, layers, segment)


def _levels(
    batch: Linearisation, maps: list[Any], layers: dict[int, Layer], segment: dict[int, int]
) -> list[Level] | None:
    curved: dict[int, list[Site]] = {}
    for site in batch.sites:
        places = {segment.get(id(edge[0]), -1) for edge in site.edges}
        if len(places) != 1 or -1 in places:
            return None
        if bool(site.c.any()):
            curved.setdefault(places.pop(), []).append(site)
    levels = []
    for place, node in enumerate(maps):
        top: Edge = input_edge(maps[place + 1]) if place + 1 < len(maps) else (batch.outputs.grad_fn, 0)
        c: Tensor | None = None
        for site in curved.get(place, []):
            part = site.c
            if not (site.plain and site.legs[0][0][0] is node):
                slope = _combined(site.legs, node)
                part = part * slope * (_combined(site.right, node) if site.right else slope)
            c = part if c is None else c + part
        levels.append(Level(node, layers.get(id(node)), _matrix(batch, node, layers), _slope(top, node), c))
    return levels


def _matrix(batch: Linearisation, node: Any, layers: dict[int, Layer]) -> Tensor:
    """W as [out, in]; the node of a first layer has saved none, its parameter is asked instead."""
    known = matrix(node)
    if known is not None:
        return known
    layer = layers.get(id(node))
    if layer is None or layer.weight is None:
        meta = sizes(node)
        return torch.empty(meta.shape[1], 0, dtype=meta.dtype, device=meta.device)
    weight = batch.objective.parameters[layer.weight].detach()
    return weight.T if layer.transposed else weight


def _is_pointwise(kind: type[NodeKind]) -> bool:
    """Whether the nodes of a kind are functions of one input, entry by entry."""
    if issubclass(kind, LayerKind):
        return kind.pointwise is not None
    return issubclass(kind, Pointwise) and kind.live_inputs == 1


def _combined(legs: Legs, node: Any) -> Tensor | float:
    """d(the legs' sum)/d(output of node), entry by entry."""
    total: Tensor | float = 0.0
    for edge, factor in legs:
        assert not isinstance(factor, Map)  # no kind of a chain has one
        slope = _slope(edge, node)
        total = total + (factor if slope is None else slope * factor)
    return total


def _slope(edge: Edge, node: Any) -> Tensor | None:
    """d(edge)/d(output of node), entry by entry; None for 1."""
    if edge[0] is node:
        return None
    if is_elementwise(edge[0]) and edge[0].next_functions[0][0] is node:
        return derivatives(edge[0])[0]
    shape, meta = edge_shape(edge), sizes(*edge)
    ones = torch.ones(shape, dtype=meta.dtype, device=meta.device)
    (found,) = torch.autograd.grad([GradientEdge(*edge)], [GradientEdge(node, 0)], [ones], retain_graph=True)
    return found.detach()


def gauss_newton(levels: list[Level], factor: Tensor, signs: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(level, q) from the top down: q [N, n] = sum over columns of sign (d column . f / da)^2."""
    dtype = levels[-1].weight.dtype
    columns = factor.to(dtype)
    plain = bool((signs > 0).all())
    weights = signs.to(dtype)[:, None, None]
    for place in range(len(levels) - 1, -1, -1):
        level = levels[place]
        if level.slope is not None:
            columns = columns * level.slope
        square = columns.square()
        yield place, (square if plain else square * weights).sum(0)
        if place:
            columns = columns @ level.weight


def functional(levels: list[Level], low: int, high: int, *, switch: int | None) -> Iterator[tuple[int, Tensor | None]]:
    """(level, q) from the top down for the samples low..high-1; q None where nothing bends from there up.

    Rows turn into a full matrix at level `switch`.
    """
    rows: list[Rows] = []
    full: Tensor | None = None
    fresh: Tensor | None = None  # c of the level above: H there is this diagonal, beside rows and full
    for place in range(len(levels) - 1, -1, -1):
        level = levels[place]
        above = levels[place + 1] if place + 1 < len(levels) else None
        slope = None if level.slope is None else level.slope[low:high]
        c = None if level.c is None else level.c[low:high]
        q = c
        if above is not None:
            parts = []
            if fresh is not None:
                parts.append(fresh @ above.weight.square())
            if full is not None:
                full, part = _full_down(full, above.weight, last=place == 0)
                parts.append(part)
            moved = []
            for b, w in rows:
                b = (b.flatten(0, 1) @ above.weight).reshape(*b.shape[:2], -1)
                parts.append((w[:, None] @ b.square())[:, 0])
                moved.append((b, w))
            rows = moved
            if fresh is not None and place:
                rows.append((above.weight[None], fresh))
            if parts:
                q = sum(parts[1:], parts[0])
                q = q if slope is None else q * slope.square()
                q = q if c is None else q + c
            if slope is not None and place:
                rows = [(b * slope[:, None], w) for b, w in rows]
                if full is not None:
                    full = full * slope[:, None] * slope[:, :, None]
            else:
                rows = [(b.expand(high - low, -1, -1), w) for b, w in rows]
        fresh = c
        yield place, q
        if place == switch:
            full, rows, fresh = _collect(full, rows, fresh), [], None


def _full_down(full: Tensor, weight: Tensor, *, last: bool) -> tuple[Tensor | None, Tensor]:
    """W^T H W and its diagonal; the diagonal alone where it is the last that is wanted."""
    half = full @ weight
    if last:
        return None, (half * weight).sum(1)
    whole = weight.T @ half
    return whole, whole.diagonal(dim1=1, dim2=2).clone()


def _collect(full: Tensor | None, rows: list[Rows], fresh: Tensor | None) -> Tensor | None:
    """The full matrix of everything carried so far."""
    parts = [] if full is None else [full]
    parts += [(b * w[:, :, None]).transpose(1, 2) @ b for b, w in rows]
    if fresh is not None:
        parts.append(torch.diag_embed(fresh))
    return sum(parts[1:], parts[0]) if parts else None


def best_switch(levels: list[Level]) -> tuple[float, int | None, int]:
    """(multiplications per sample, level at which rows become a full matrix, largest number of entries
    carried).
    """
    choices = [(*_work(levels, switch), switch) for switch in (None, *range(len(levels) - 1, 1, -1))]
    work, entries, switch = min(choices, key=lambda choice: choice[0])
    return work, switch, entries


def _work(levels: list[Level], switch: int | None) -> tuple[float, int]:
    work, most, rows, full, fresh = 0.0, 0, 0, False, 0
    for place in range(len(levels) - 1, -1, -1):
        width = levels[place].width
        if place + 1 < len(levels):
            above = levels[place + 1].width
            work += rows * above * width + (above * width * (above if place == 0 else above + width) if full else 0)
            rows += fresh if place else 0
        fresh = width if levels[place].c is not None else 0
        most = max(most, rows * width + (width * width if full else 0))
        if place == switch:
            work += rows * width * width
            full, rows, fresh = full or rows > 0 or fresh > 0, 0, 0
    return work, most
