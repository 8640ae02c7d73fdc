"""Forward-mode products through the nodes of a recorded autograd graph, many directions at a time.

One pass moves K directions of every sample of the batch from a layer's output to all sites above. Nodes without a rule
(see `moves`) are moved by double backward of that one node: v -> J^T v is linear, so the gradient of <J^T v, u> with
respect to v is J u.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor

from hessdiag.graph.affine import sign_of
from hessdiag.graph.moves import Cache, double_backward, factor_of, move
from hessdiag.graph.nodes import Edge, Key, edge_key, edge_shape
from hessdiag.graph.reading import Graph
from hessdiag.graph.sites import Map, Site
from hessdiag.graph.tangents import Tangent


@dataclass(frozen=True)
class Stop:
    """A node on the way, and what happens there: what is `given` and comes out, the sites that are due, the tangents
    that have served, and of these the ones that no site looks at.
    """

    node: Any
    given: tuple[tuple[int, Edge, Key, torch.Size], ...]
    outputs: tuple[tuple[int, Key, torch.Size], ...]
    due: tuple[tuple[int, Site], ...]
    ends: tuple[Key, ...]
    spare: tuple[Key, ...]


class Route:
    """The nodes between some edges of the graph and the sites above them, in the order of a forward pass.

    Built once per layer, or for several together; `run` may be called for any number of chunks of directions. `sites`
    come with their numbers.
    """

    def __init__(self, graph: Graph, starts: Sequence[Edge], sites: Sequence[tuple[int, Site]], cache: Cache) -> None:
        self.starts = starts
        self._cache = cache
        first = {id(node) for node, _ in starts}
        reached: set[int] = set()
        above: list[Any] = []
        for node in graph.nodes:
            if id(node) in first or any(id(source) in reached for _, (source, _) in graph.inputs(node)):
                reached.add(id(node))
                above.append(node)
        self.sites = [(number, site) for number, site in sites if any(id(edge[0]) in reached for edge in site.edges)]
        needed = {id(edge[0]) for _, site in self.sites for edge in site.edges}
        self.nodes: list[tuple[Any, list[int]]] = []
        for node in reversed(above):
            if id(node) in needed:
                slots = [slot for slot, (source, _) in graph.inputs(node) if id(source) in reached]
                needed |= {id(node.next_functions[slot][0]) for slot in slots}
                self.nodes.append((node, slots))
        self.nodes.reverse()
        self._plan()

    def _plan(self) -> None:
        """Which outputs of each node are wanted, when sites are due, and when a tangent has served."""
        wanted: dict[int, set[int]] = {}
        last: dict[Key, int] = {}
        for position, (node, slots) in enumerate(self.nodes):
            for slot in slots:
                source, number = node.next_functions[slot]
                wanted.setdefault(id(source), set()).add(number)
                last[id(source), number] = position
        place = {id(node): position for position, (node, _) in enumerate(self.nodes)}
        due_at: dict[int, list[tuple[int, Site]]] = {}
        for number, site in self.sites:
            legs = [edge for edge in site.edges if id(edge[0]) in place]
            when = max(place[id(edge[0])] for edge in legs)
            due_at.setdefault(when, []).append((number, site))
            for node, output in legs:
                wanted.setdefault(id(node), set()).add(output)
                last[id(node), output] = max(last.get((id(node), output), -1), when)
        ends: dict[int, list[Key]] = {}
        for key, position in last.items():
            ends.setdefault(position, []).append(key)
        self.stops: list[Stop] = []
        for position, (node, slots) in enumerate(self.nodes):
            given = [(slot, node.next_functions[slot]) for slot in slots]
            edges = [(node, number) for number in sorted(wanted.get(id(node), ()))]
            due, over = due_at.get(position, []), ends.get(position, [])
            looked = {edge_key(edge) for _, site in due for edge in site.edges}
            self.stops.append(
                Stop(
                    node,
                    tuple((slot, edge, edge_key(edge), edge_shape(edge)) for slot, edge in given),
                    tuple((edge[1], edge_key(edge), edge_shape(edge)) for edge in edges),
                    tuple(due),
                    tuple(over),
                    tuple(key for key in over if key not in looked),
                )
            )

    def run(self, seeds: Sequence[Tangent]) -> Iterator[tuple[int, Site, Tangent, Tangent | None]]:
        """Move tangents of the starts up; yield every site's dz as it becomes known: (index, site, dz, dw of a pair).

        The directions of all starts stand one after the other. Those of a pair are dense; one of which only half is
        reached adds nothing.
        """
        tangents: dict[Key, Tangent] = {}
        ends = list(accumulate((len(seed.value) for seed in seeds), initial=0))
        begun: dict[Key, list[tuple[int, Tangent]]] = {}
        for edge, low, seed in zip(self.starts, ends, seeds):
            begun.setdefault(edge_key(edge), []).append((low, seed))
        for stop in self.stops:
            given = [(slot, edge, shape, tangents[key]) for slot, edge, key, shape in stop.given if key in tangents]
            if given:
                free = self._free(stop, tangents) if len(stop.outputs) == 1 else set()
                for output, key, shape in stop.outputs:
                    tangents[key] = self._step(stop.node, output, shape, given, tangents, free)
            for _, key, shape in stop.outputs:
                for low, seed in begun.get(key, ()):
                    tangents[key] = _begun(tangents.get(key), low, seed, ends[-1], shape)
            if stop.due:
                yield from self._sites_at(stop, tangents)
            for key in stop.ends:
                tangents.pop(key, None)

    def _free(self, stop: Stop, tangents: dict[Key, Tangent]) -> set[int]:
        """Storages that nothing needs once the node has been passed."""
        ending = [key for key in stop.spare if key in tangents]
        if not ending:
            return set()
        freed = [_storage(tangents[key]) for key in ending]
        kept = {_storage(tangent) for key, tangent in tangents.items() if key not in ending}
        return {storage for storage in freed if storage not in kept and freed.count(storage) == 1}

    def _sites_at(
        self, stop: Stop, tangents: dict[Key, Tangent]
    ) -> Iterator[tuple[int, Site, Tangent, Tangent | None]]:
        for number, site in stop.due:
            left, right = (_known(legs, tangents) for legs in (site.legs, site.right))
            if not site.right:
                yield number, site, self._along(site, left), None
            elif left and right:
                halves = (Tangent(self._along(site, legs).dense(site.c.shape)) for legs in (left, right))
                yield number, site, next(halves), next(halves)

    def _along(self, site: Site, legs: list[tuple[float | Tensor | Map, Edge, Tangent]]) -> Tangent:
        """The sum over legs."""
        shape = tuple(site.c.shape)
        factor, edge, tangent = legs[0]
        if len(legs) == 1 and not isinstance(factor, Map) and tuple(edge_shape(edge)) == shape:
            if isinstance(factor, Tensor):
                return tangent.scaled(factor.expand(shape))
            return tangent if factor == 1.0 else Tangent(tangent.value * factor, tangent.factor, tangent.band)
        total: Tensor | None = None
        for factor, edge, tangent in legs:
            part = tangent.dense(edge_shape(edge))
            if isinstance(factor, Map):
                part = factor.push(part)
            else:
                part = part.reshape(len(part), *(1,) * (len(shape) - part.ndim + 1), *part.shape[1:]) * factor
            total = part if total is None else total + part
        assert total is not None
        return Tangent(total.expand(-1, *shape))

    def _settled(self, edge: Edge, tangent: Tangent, tangents: dict[Key, Tangent], free: set[int]) -> Tangent:
        """Without its pending factor, for this node and whoever takes it after."""
        found = tangent.settled(last=_storage(tangent) in free)
        if found is not tangent:
            tangents[edge_key(edge)] = found
        return found

    def _step(
        self,
        node: Any,
        output: int,
        shape: torch.Size,
        given: list[tuple[int, Edge, torch.Size, Tangent]],
        tangents: dict[Key, Tangent],
        free: set[int],
    ) -> Tangent:
        if len(given) == 1:
            slot, _, own, tangent = given[0]
            if own == shape:
                known, factor = self._factor(node, slot)
                if known:
                    return tangent if factor is None else tangent.scaled(factor)
        if node.name() in ("AddBackward0", "SubBackward0") and all(own == shape for _, _, own, _ in given):
            return self._sum(node, [(slot, tangent) for slot, _, _, tangent in given], shape, free)
        settled = [(slot, edge, self._settled(edge, tangent, tangents, free)) for slot, edge, _, tangent in given]
        moved = move(node, output, shape, settled)
        if moved is not None:
            return moved
        parts = [(slot, tangent.dense(edge_shape(edge))) for slot, edge, tangent in settled]
        return Tangent(double_backward(node, output, shape, parts, self._cache))

    def _factor(self, node: Any, slot: int) -> tuple[bool, Tensor | None]:
        key = ("factor", id(node), slot)
        if key not in self._cache:
            self._cache[key] = factor_of(node, slot)
        found: tuple[bool, Tensor | None] = self._cache[key]
        return found

    def _sum(self, node: Any, given: list[tuple[int, Tangent]], shape: torch.Size, free: set[int]) -> Tangent:
        signs = [sign_of(node, slot) for slot, _ in given]
        tangents = [tangent for _, tangent in given]
        if len({t.band for t in tangents}) > 1:
            tangents = [Tangent(t.dense(shape)) for t in tangents]
        first, *rest = tangents
        value = first.settled(last=_storage(first) in free).value
        own = value is not first.value or (first.owned and _storage(first) in free)
        if signs[0] != 1.0:
            value, own = value * signs[0], True
        for tangent, sign in zip(rest, signs[1:]):
            value, own = added(value, tangent, sign, own), True
        return Tangent(value, None, first.band, own)


def added(value: Tensor, tangent: Tangent, sign: float, own: bool) -> Tensor:
    """value + sign * tangent, in one step where it has a pending factor; in place in what is `own`."""
    other = tangent.value
    own = own and value.shape == other.shape
    if tangent.factor is None:
        return value.add_(other, alpha=sign) if own else torch.add(value, other, alpha=sign)
    factor = tangent.narrowed(tangent.factor)
    return value.addcmul_(other, factor, value=sign) if own else torch.addcmul(value, other, factor, value=sign)


def _begun(before: Tangent | None, low: int, seed: Tangent, count: int, shape: torch.Size) -> Tangent:
    """What has reached an edge, and the directions low.. of `count` that start there."""
    if before is None and len(seed.value) == count:
        return seed
    own = seed.dense(shape)
    total = own.new_zeros(count, *shape) if before is None else before.dense(shape).clone()
    total[low : low + len(own)] += own
    return Tangent(total, owned=True)


T = TypeVar("T")


def _known(legs: Iterable[tuple[Edge, T]], tangents: dict[Key, Tangent]) -> list[tuple[T, Edge, Tangent]]:
    """Those edges that a tangent has reached, with it."""
    return [(tag, edge, tangents[edge_key(edge)]) for edge, tag in legs if edge_key(edge) in tangents]


def _storage(tangent: Tangent) -> int:
    return tangent.value.untyped_storage().data_ptr()
