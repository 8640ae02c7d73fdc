"""Layers that feed a site tensor directly, so that what they add to it is known without signs.

A site on one tensor, fed entry by entry and affinely: the layer's share of it is diagonal (`Direct`). One half of a
pair, where the other half does not depend on that output unit of a linear layer (queries do not know their keys): the
share is zero, and the half's seed is noise (`Own`).

A site that mixes the entries of rows (LayerNorm's), fed by moves and sums such that no two entries of a row share a
parameter of the layer: the share is the sum of c (dz_j/dx_k)^2 over the site's entries j, entry k by entry (`Rowed`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from hessdiag.graph import saved
from hessdiag.graph.layers import KINDS, Layer, LayerKind
from hessdiag.graph.nodes import Edge, Key, edge_key, edge_shape, sizes
from hessdiag.graph.pullback import random_like
from hessdiag.graph.reading import Graph
from hessdiag.graph.sites import Map, Site
from hessdiag.graph.sites.elementwise import is_elementwise
from hessdiag.graph.sites.site import Legs


@dataclass(frozen=True)
class Direct:
    """A site tensor that one layer feeds by an elementwise affine map alone: dz = slope * da, entry by entry."""

    site: int
    slope: Tensor


@dataclass(frozen=True)
class Own:
    """A half of a pair that a linear layer feeds by few operations; `kept` are the output units on which the other half
    does not depend.
    """

    site: int
    second: bool
    leg: int
    kept: Tensor


@dataclass(frozen=True)
class Rowed:
    """Sites on one edge that mix rows, of which the layer feeds every entry by parameters of its own."""

    sites: tuple[int, ...]
    edge: Edge


_MOVES = frozenset(
    f"{name}Backward{number}"
    for name in (
        "View", "UnsafeView", "ReshapeAlias", "Clone", "Alias", "Transpose", "Permute", "T", "Split", "SplitWithSizes",
        "Unbind", "Select", "Slice", "Narrow", "Squeeze", "Unsqueeze", "Expand", "Neg", "Mul", "Div", "Add", "Sub",
        "MaskedFill", "Where", "Softmax", "SafeSoftmax",
    )
    for number in range(3)
)  # fmt: skip


def find_own(graph: Graph, sites: Sequence[Site], layers: Sequence[Layer]) -> dict[int, list[Own]]:
    """For each linear layer (by its place) the halves of pairs whose seeds say nothing of its parameters."""
    halves: dict[Key, list[tuple[int, bool, int]]] = {}
    for number, site in enumerate(sites):
        for second, legs in ((False, site.legs), (True, site.right)):
            for place, (edge, _) in enumerate(legs if site.right else ()):
                halves.setdefault(edge_key(edge), []).append((number, second, place))
    found: dict[int, list[Own]] = {}
    for place, layer in enumerate(layers if halves else ()):
        if layer.kind.name != "linear":
            continue
        for number, second, leg in _reached(graph, layer.node, halves):
            other = sites[number].legs if second else sites[number].right
            kept = _unreached(graph, layer, other)
            if bool(kept.any()):
                found.setdefault(place, []).append(Own(number, second, leg, kept))
    return found


def _reached(
    graph: Graph, start: Any, halves: Mapping[Key, list[tuple[int, bool, int]]]
) -> list[tuple[int, bool, int]]:
    """Legs above a node with nothing but what attention is made of and functions of single entries between."""
    found, stack, seen = list[tuple[int, bool, int]](), [start], {id(start)}
    while stack:
        for user, slot in graph.consumers(stack.pop()):
            found += halves.get(edge_key(user.next_functions[slot]), [])
            live = sum(graph.is_live(source) for source, _ in user.next_functions)
            known = user.name() == "BmmBackward0" or (live == 1 and (user.name() in _MOVES or is_elementwise(user)))
            if id(user) not in seen and known:
                seen.add(id(user))
                stack.append(user)
    return list(dict.fromkeys(found))


def _unreached(graph: Graph, layer: Layer, legs: Legs) -> Tensor:
    """Output units of a linear layer on which a combination does not depend, as numbers 0 and 1."""
    meta = sizes(layer.node)
    kept = torch.ones(meta.shape[-1], dtype=meta.dtype, device=meta.device)
    for edge, _ in legs:
        if graph.is_free(edge[0]):
            continue
        own = sizes(*edge)
        seed = random_like(torch.Size(own.shape), own.dtype, own.device, 5)
        found = carried(layer, edge, seed)
        if found is not None:
            kept *= (found.reshape(-1, len(kept)) == 0).all(0)
    return kept


def find_rowed(graph: Graph, sites: Sequence[Site], squares: Sequence[LayerKind]) -> dict[int, Rowed]:
    """For each layer (by its place) the first edge above it on which such sites stand, if any."""
    mixed: dict[Key, list[int]] = {}
    for number, site in enumerate(sites):
        if not site.right and len(site.legs) == 1 and isinstance(site.legs[0][1], Map) and site.legs[0][1].rows:
            mixed.setdefault(edge_key(site.legs[0][0]), []).append(number)
    found: dict[int, Rowed] = {}
    for place, square in enumerate(squares if mixed else ()):
        layer = square.layer
        units = square.units() if layer.kind.has_closed_share() else None
        edge: Edge = (layer.node, 0)
        while units is not None and edge_key(edge) not in mixed:
            users = graph.consumers(edge[0])
            if len(users) != 1 or not _carries(users[0][0]):
                break
            edge = (users[0][0], 0)
        if units is None or edge_key(edge) not in mixed:
            continue
        factor = sites[mixed[edge_key(edge)][0]].legs[0][1]
        assert isinstance(factor, Map)
        if _are_apart(layer, edge, units, factor.rows):
            found[place] = Rowed(tuple(mixed[edge_key(edge)]), edge)
    return found


def _carries(node: Any) -> bool:
    """Whether every entry of the node's output is one entry of what it is given, or that and something more."""
    name = node.name()
    if name == "AddBackward0":
        return saved.number(node, "alpha", 1.0) == 1
    plain = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "CloneBackward0")
    return name in (*plain, "TransposeBackward0", "PermuteBackward0")


def _are_apart(layer: Layer, edge: Edge, units: Tensor, rows: int) -> bool:
    """Whether the entries of a row (of so many) each belong to another unit of the layer."""
    own, meta = sizes(*edge), sizes(layer.node)
    size = torch.Size(own.shape).numel()
    if size != torch.Size(meta.shape).numel() or rows > 1 << 23:
        return False
    numbers = torch.arange(rows, dtype=own.dtype, device=own.device).repeat_interleave(size // rows).reshape(own.shape)
    found = [carried(layer, edge, seed) for seed in (torch.ones_like(numbers), numbers)]
    if found[0] is None or found[1] is None or not bool((found[0] == 1).all()):
        return False
    pairs = found[1].reshape(-1).long() * (int(units.max()) + 1) + units.expand(meta.shape).reshape(-1)
    return len(torch.unique(pairs)) == size


def carried(layer: Layer, edge: Edge, seed: Tensor) -> Tensor | None:
    """A cotangent of an edge above a layer, brought to the layer's output."""
    (found,) = torch.autograd.grad([GradientEdge(*edge)], [layer.edge], [seed], retain_graph=True, allow_unused=True)
    return found


def find_direct(graph: Graph, owners: Mapping[Key, int], layers: Sequence[Layer]) -> dict[int, Direct]:
    """For each of `layers` (by its place) the site tensor it feeds directly, if any.

    Between a layer and that site nothing but normalisations, sums, constant factors and reshapes, each consumed
    once: all of the layer's influence then passes through z, and its own share of the site is diagonal.
    `owners` gives the place of every site of a single leg by the key of its edge.
    """
    found: dict[int, Direct] = {}
    for place, layer in enumerate(layers):
        if not layer.kind.has_closed_share():
            continue
        edge: Edge = (layer.node, 0)
        while edge_key(edge) not in owners:
            users = graph.consumers(edge[0])
            if len(users) != 1 or not _passes(graph, users[0][0], users[0][1], edge):
                break
            edge = (users[0][0], 0)
        else:
            site = owners[edge_key(edge)]
            if edge == (layer.node, 0):
                found[place] = Direct(site, torch.ones((), dtype=graph.outputs.dtype, device=graph.outputs.device))
                continue
            one = torch.ones((), dtype=graph.outputs.dtype, device=graph.outputs.device)
            ones = one.expand(edge_shape(edge))
            (slope,) = torch.autograd.grad([GradientEdge(*edge)], [layer.edge], [ones], retain_graph=True)
            found[place] = Direct(site, _fewest(slope))
    return found


def _fewest(slope: Tensor) -> Tensor:
    """One number, or those of one sample, where that is all there is: a tensor of its own, which holds no more."""
    for few in (slope[(slice(1),) * slope.ndim], slope[:1]):
        if bool((slope == few).all()):
            return few.clone()
    return slope


def junction(graph: Graph, layer: Layer) -> Key:
    """Where a layer's output has become one summand: the last edge above it that only sums and moves lead to."""
    edge: Edge = (layer.node, 0)
    while True:
        users = graph.consumers(edge[0])
        if len(users) != 1 or not (_carries(users[0][0]) or _passes(graph, *users[0], edge)):
            return edge_key(edge)
        edge = (users[0][0], 0)


def _passes(graph: Graph, node: Any, slot: int, edge: Edge) -> bool:
    """Whether `node` maps the value of `edge` entry by entry, affinely."""
    name = node.name()
    if name in (
        "ViewBackward0",
        "UnsafeViewBackward0",
        "ReshapeAliasBackward0",
        "CloneBackward0",
        "NegBackward0",
    ):
        return True
    if tuple(edge_shape((node, 0))) != tuple(edge_shape(edge)):
        return False
    for kind in KINDS.of(node):
        if kind.pointwise is not None:
            return slot == kind.pointwise
    if name in ("AddBackward0", "SubBackward0"):
        return True
    if name == "MulBackward0":
        return not any(graph.is_live(s) for i, (s, _) in enumerate(node.next_functions) if i != slot)
    return False
