"""What moving one direction of every layer to the sites above it would take, without a route for each.

`Route` walks all nodes above its layer: for all layers that is the square of their number, which a pass through each
takes as well, but a forecast should not. Here which layer reaches which node is a table of truth values, filled node by
node for many layers at once, and what a node costs is the same for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hessdiag.graph import Graph, Layer, Site, edge_shape
from hessdiag.graph.moves import fan_of
from hessdiag.graph.nodes import Edge, Key, edge_key
from hessdiag.kernels.directions import Shared

BLOCK = 256
"""Layers looked at together."""


@dataclass(frozen=True)
class Price:
    """For one direction of every sample: multiplications, tangent entries alive at once, sites, nodes passed."""

    work: float
    entries: int
    sites: int
    nodes: int


def prices(graph: Graph, layers: Sequence[Layer | Shared], sites: Sequence[Site]) -> list[Price]:
    """One for each layer; all zero for a layer below no site."""
    found: list[Price] = []
    table = _Nodes(graph, sites)
    for low in range(0, len(layers), BLOCK):
        found += table.of(layers[low : low + BLOCK])
    return found


class _Nodes:
    """The nodes that lead to a site, in forward order: what each costs, and how long its outputs are needed."""

    def __init__(self, graph: Graph, sites: Sequence[Site]) -> None:
        self.place = {id(node): number for number, node in enumerate(graph.nodes)}
        self.legs = [[self.place[id(edge[0])] for edge in site.edges] for site in sites]
        self.sizes = [float(site.c.numel()) for site in sites]
        leads = {place for places in self.legs for place in places}
        last: dict[Key, int] = {}
        self.edges: dict[Key, Edge] = {}
        for site, places in zip(sites, self.legs):
            for edge in site.edges:
                last[edge_key(edge)] = max(last.get(edge_key(edge), -1), *places)
                self.edges[edge_key(edge)] = edge
        self.sources: list[list[int]] = [[] for _ in graph.nodes]
        for number in range(len(graph.nodes) - 1, -1, -1):
            if number not in leads:
                continue
            for _, edge in graph.inputs(graph.nodes[number]):
                place = self.place[id(edge[0])]
                leads.add(place)
                self.sources[number].append(place)
                last[edge_key(edge)] = max(last.get(edge_key(edge), -1), number)
                self.edges[edge_key(edge)] = edge
        self.work = np.zeros(len(graph.nodes))
        self.alive = [
            (self.place[key[0]], end, float(edge_shape(self.edges[key]).numel())) for key, end in last.items()
        ]
        fans: dict[int, int] = {}
        for (key, _), (place, _, size) in zip(last.items(), self.alive):
            if key[0] not in fans:
                fans[key[0]] = fan_of(self.edges[key][0]) if self.sources[place] else 0
            self.work[place] += size * fans[key[0]]

    def of(self, layers: Sequence[Layer | Shared]) -> list[Price]:
        """Of layers that share a table."""
        reached = np.zeros((len(self.sources), len(layers)), dtype=bool)
        starts = [self.place[id(layer.node)] for layer in layers]
        reached[starts, range(len(layers))] = True
        for number, sources in enumerate(self.sources):
            for source in sources:
                reached[number] |= reached[source]
        work = self.work @ reached - self.work[starts]
        passed = np.array([bool(sources) for sources in self.sources], dtype=float)
        nodes = passed @ reached - passed[starts]
        change = np.zeros((len(self.sources) + 1, len(layers)))
        for place, end, size in self.alive:
            change[place] += size * reached[place]
            change[end + 1] -= size * reached[place]
        most = np.cumsum(change, axis=0, out=change).max(axis=0)
        seen = np.zeros(len(layers))
        for places, size in zip(self.legs, self.sizes):
            seen += size * reached[places].any(axis=0)
        own = [edge_shape((layer.node, 0)).numel() for layer in layers]
        return [
            Price(float(w) + 4.0 * float(s), max(int(m), o), int(s), int(n)) if s else Price(0.0, 0, 0, 0)
            for w, m, s, o, n in zip(work, most, seen, own, nodes)
        ]
