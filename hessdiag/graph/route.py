"""Forward-mode products through the nodes of a recorded autograd graph, many directions at a time.

One pass moves K directions of every sample of the batch from a layer's output to all sites above. Nodes without a rule
(see `moves`) are moved by double backward of that one node: v -> J^T v is linear, so the gradient of <J^T v, u> with
respect to v is J u.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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
            if id(node) in first or any(id(source) in reached for source, _ in node.next_functions):
                reached.add(id(node))
                above.append(node)
        self.sites = [(number, site) for number, site in sites if any(id(edge[0]) in reached for edge in site.edges)]
        needed = {id(edge[0]) for _, site in self.sites for edge in site.edges}
        self.nodes: list[tuple[Any, list[int]]] = []
        for node in reversed(above):
            if id(node) in needed:
                slots = [slot for slot, (source, _) in enumerate(node.next_functions) if id(source) in reached]
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
        self._due: dict[int, list[tuple[int, Site]]] = {}
        for number, site in self.sites:
            legs = [edge for edge in site.edges if id(edge[0]) in place]
            when = max(place[id(edge[0])] for edge in legs)
            self._due.setdefault(when, []).append((number, site))
            for node, output in legs:
                wanted.setdefault(id(node), set()).add(output)
                last[id(node), output] = max(last.get((id(node), output), -1), when)
        self._wanted = {key: sorted(outputs) for key, outputs in wanted.items()}
        self._ends: dict[int, list[Key]] = {}
        for key, position in last.items():
            self._ends.setdefault(position, []).append(key)

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
        for position, (node, slots) in enumerate(self.nodes):
            given = _known([(node.next_functions[slot], slot) for slot in slots], tangents)
            outputs = self._wanted.get(id(node), ())
            if given:
                free = self._free(position, tangents) if len(outputs) == 1 else set()
                for output in outputs:
                    tangents[id(node), output] = self._step(node, output, given, tangents, free)
            for key in ((id(node), output) for output in outputs):
                for low, seed in begun.get(key, ()):
                    tangents[key] = _begun(tangents.get(key), low, seed, ends[-1], edge_shape((node, key[1])))
            yield from self._sites_at(position, tangents)
            for key in self._ends.get(position, ()):
                tangents.pop(key, None)

    def _free(self, position: int, tangents: dict[Key, Tangent]) -> set[int]:
        """Storages that nothing needs once the node at `position` has been passed."""
        due = {edge_key(edge) for _, site in self._due.get(position, ()) for edge in site.edges}
        ending = [key for key in self._ends.get(position, ()) if key in tangents and key not in due]
        kept = {_storage(tangent) for key, tangent in tangents.items() if key not in ending}
        freed = [_storage(tangents[key]) for key in ending]
        return {storage for storage in freed if storage not in kept and freed.count(storage) == 1}

    def _sites_at(
        self, position: int, tangents: dict[Key, Tangent]
    ) -> Iterator[tuple[int, Site, Tangent, Tangent | None]]:
        for number, site in self._due.get(position, ()):
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
        given: list[tuple[int, Edge, Tangent]],
        tangents: dict[Key, Tangent],
        free: set[int],
    ) -> Tangent:
        shape = edge_shape((node, output))
        if len(given) == 1:
            slot, edge, tangent = given[0]
            if tuple(edge_shape(edge)) == tuple(shape):
                known, factor = self._factor(node, slot)
                if known:
                    return tangent if factor is None else tangent.scaled(factor)
        plain = all(tuple(edge_shape(edge)) == tuple(shape) for _, edge, _ in given)
        if plain and node.name() in ("AddBackward0", "SubBackward0"):
            return self._sum(node, given, shape, free)
        given = [(slot, edge, self._settled(edge, tangent, tangents, free)) for slot, edge, tangent in given]
        moved = move(node, output, shape, given)
        if moved is not None:
            return moved
        parts = [(slot, tangent.dense(edge_shape(edge))) for slot, edge, tangent in given]
        return Tangent(double_backward(node, output, shape, parts, self._cache))

    def _factor(self, node: Any, slot: int) -> tuple[bool, Tensor | None]:
        key = ("factor", id(node), slot)
        if key not in self._cache:
            self._cache[key] = factor_of(node, slot)
        found: tuple[bool, Tensor | None] = self._cache[key]
        return found

    def _sum(self, node: Any, given: list[tuple[int, Edge, Tangent]], shape: torch.Size, free: set[int]) -> Tangent:
        signs = [sign_of(node, slot) for slot, _, _ in given]
        tangents = [tangent for _, _, tangent in given]
        if len({t.band for t in tangents}) > 1:
            tangents = [Tangent(t.dense(shape)) for t in tangents]
        first, *rest = tangents
        value = first.settled(last=_storage(first) in free).value
        own = value is not first.value or (first.owned and _storage(first) in free)
        if signs[0] != 1.0:
            value, own = value * signs[0], True
        for tangent, sign in zip(rest, signs[1:]):
            value, own = _added(value, tangent, sign, own), True
        return Tangent(value, None, first.band, own)


def _added(value: Tensor, tangent: Tangent, sign: float, own: bool) -> Tensor:
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
