"""Layers that feed a site tensor directly: entry by entry and affinely, so that their share of it is diagonal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from hessdiag.graph.layers import KINDS, Layer
from hessdiag.graph.nodes import Edge, Key, edge_key, edge_shape
from hessdiag.graph.reading import Graph


@dataclass(frozen=True)
class Direct:
    """A site tensor that one layer feeds by an elementwise affine map alone: dz = slope * da, entry by entry."""

    site: int
    slope: Tensor


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
            ones = torch.ones(edge_shape(edge), dtype=graph.outputs.dtype, device=graph.outputs.device)
            (slope,) = torch.autograd.grad([GradientEdge(*edge)], [layer.edge], [ones], retain_graph=True)
            first = slope[:1]
            found[place] = Direct(site, first if bool((slope == first).all()) else slope)
    return found


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
