"""One forward pass becomes a list of sites: where the loss of a batch bends, and how much.

For a loss summed over the samples of a batch (mathematics: the site identity)

    H_kk = sum_n (df_n/dtheta_k)^T (d2l_n/df2) (df_n/dtheta_k) + sum_j c_j (dz_j/dtheta_k)^2,
    c_j = sigma''(z_j) dl/dh_j   at an elementwise node h = sigma(z).

A node with several inputs y = phi(u) adds <g, phi''(du, du)>, g = dl/dy, written as sites by its kind (see
`hessdiag.graph.sites.site`); a product h = a b of two activations is a pair, 2 g da db. Sites whose z are elementwise
functions of one and the same tensor u are merged into one on u, c_u = sum c_j (dz_j/du)^2 (and 2 g a'(u) b'(u) for a
product): x * sigmoid(x) written out costs no more than SiLU.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from hessdiag.errors import NonFiniteError
from hessdiag.graph.direct import Direct, Rowed, carried, find_direct, find_own, find_rowed, junction
from hessdiag.graph.layers import Layer
from hessdiag.graph.nodes import Edge, Key, edge_key, edge_shape, is_leaf, short_name
from hessdiag.graph.reading import Graph, detach_guard
from hessdiag.graph.saved import constant
from hessdiag.graph.sites import Map, Pointwise, Site, SiteKind
from hessdiag.graph.sites.elementwise import Elementwise, derivatives
from hessdiag.graph.sites.site import pulled
from hessdiag.problem.finite import all_finite
from hessdiag.problem.objective import Objective
from hessdiag.problem.persample import Curvature

Pull = tuple[int, bool, int]
"""A leg: the number of its site, whether it is of the second half of a pair, and its number there."""
Pulls = dict[Pull, tuple[Edge, Tensor]]
"""Edges and their cotangents, leg by leg."""


class _Bend:
    """A node that bends, on one batch: its adjoint, and its form in its live inputs where it acts entry by entry."""

    def __init__(self, kind: type[SiteKind], node: Any, asked: Mapping[Edge, Tensor], name: str) -> None:
        self.kind, self.node, self.name = kind, node, name
        self.adjoints = {number: g for (above, number), g in asked.items() if above is node}
        self.below = next((g for (below, _), g in asked.items() if below is not node), None)
        self.form: dict[tuple[int, int], Tensor] = {}
        if issubclass(kind, Pointwise):
            for pair, second in kind.second(node).items():
                plain = isinstance(second, float) and second == 1.0
                self.form[pair] = self.adjoints[0] if plain else second * self.adjoints[0]
        self.slots = sorted({slot for pair in self.form for slot in pair})
        self.edges: list[Edge] = [node.next_functions[slot] for slot in self.slots]


class Linearisation:
    """One batch through the model: outputs, the loss's curvature at them, layers and sites, ready for passes.

    Holds the autograd graph; `backward` may be called any number of times. Weights are those of the loss *summed*
    over the batch; `weight` is what the batch adds to the divisor of the mean. `outputs` are the model's, with their
    graph, where they are at hand. Not `closed`, shares of norms and of one half of a pair are left to signs.
    """

    def __init__(
        self,
        objective: Objective,
        inputs: Any,
        targets: Tensor,
        *,
        index: int = 0,
        balance: Mapping[int, float] | None = None,
        outputs: Tensor | None = None,
        closed: bool = True,
    ) -> None:
        if outputs is None:
            with torch.enable_grad():
                outputs = objective.outputs(inputs, targets, index=index)
        self.outputs: Tensor = outputs
        detach_guard(self.outputs)
        self.objective, self.targets = objective, targets
        self.samples = len(targets)
        self.graph = Graph(self.outputs, objective.parameters)
        self.layers: list[Layer] = self.graph.layers
        self.shared: list[Layer] = self.graph.shared
        self.crossing: dict[int, int] = {}
        """Places of shared layers by the sites of their own bilinear terms."""
        with torch.no_grad():
            self.curvature: Curvature = objective.loss.curvature(self.outputs, targets)
            self.columns = self.curvature.columns.count  # refused here where they would be too large a square
        if not all_finite(self.curvature.loss):
            raise NonFiniteError(f"batch {index}: the loss {objective.loss.name!r} is not finite; check the targets")
        self.sites: list[Site] = self._find_sites(index)
        self.balance(balance or {})
        self.free = frozenset(
            number for number, s in enumerate(self.sites) if all(self.graph.is_free(edge[0]) for edge in s.edges)
        )
        """Sites of the free side, by number: they have no samples."""
        self.kept: dict[str, Any] = {}
        """What kernels found out about it, for their next call."""
        self.separate = False
        """Whether the samples were looked at and do not meet."""
        self._shares: dict[bool, dict[Pull, tuple[tuple[Pull, ...], dict[int, Tensor | float]]]] = {}
        self._closed = closed
        self._rowed: dict[int, Rowed] | None = None if closed else {}

    def balance(self, lams: Mapping[int, float]) -> None:
        """Give pairs, counted among themselves, their `lam`: 1 where none is named, whatever it was."""
        pairs = [number for number, site in enumerate(self.sites) if site.right]
        for number, place in enumerate(pairs):
            self.sites[place] = replace(self.sites[place], lam=lams.get(number, 1.0))

    @cached_property
    def weight(self) -> float:
        """What the batch adds to the divisor of the mean."""
        with torch.no_grad():
            return float(self.objective.loss.weights(self.outputs, self.targets).sum())

    @cached_property
    def direct(self) -> dict[int, Direct]:
        """What layers have in sites that they feed by nothing but elementwise maps, by their place in `layers`."""
        owners = {edge_key(site.legs[0][0]): n for n, site in enumerate(self.sites) if site.plain}
        return find_direct(self.graph, owners, self.layers)

    @property
    def loss(self) -> float:
        """Loss summed over the batch."""
        return float(self.curvature.loss.sum())

    def backward(
        self,
        seeds: Sequence[Tensor | None],
        output_seed: Tensor | None,
        targets: Sequence[GradientEdge | Tensor],
        *,
        right: Sequence[Tensor | None] | None = None,
        create_graph: bool = False,
        above: bool = False,
    ) -> tuple[Tensor | None, ...]:
        """One backward pass with many roots: sum_j seed_j dz_j/dt + output_seed . df/dt for every t in `targets`.

        Of a pair the second half takes the seeds of `right`, or without these the same as the first. `above` leaves out
        what sites look at of the free side, which has no samples.
        """
        pulls = self.pull(seeds, seeds if right is None else right, above=above)
        return self.backward_from(pulls, output_seed, targets, create_graph=create_graph)

    def pull(self, seeds: Sequence[Tensor | None], right: Sequence[Tensor | None], *, above: bool = False) -> Pulls:
        """Cotangents of the edges that sites look at, leg by leg, for seeds as `backward` takes them."""
        found: Pulls = {}
        for number, sides in enumerate(zip(seeds, right)):
            for pull, edge in self.legs(number, above=above):
                seed = sides[pull[1]]
                if seed is not None:
                    found[pull] = edge, self.pulled(pull, seed)
        return found

    def legs(self, number: int, *, above: bool = False) -> list[tuple[Pull, Edge]]:
        """The legs of a site and what they look at; `above` leaves out the free side."""
        site = self.sites[number]
        found = [
            ((number, second, leg), edge)
            for second, legs in ((False, site.legs), (True, site.right))
            for leg, (edge, _) in enumerate(legs)
        ]
        return [(pull, edge) for pull, edge in found if not (above and self.graph.is_free(edge[0]))]

    def pulled(self, pull: Pull, seed: Tensor) -> Tensor:
        """The cotangent of what a leg looks at for a seed of its site."""
        number, second, leg = pull
        site = self.sites[number]
        return pulled(*(site.right if second else site.legs)[leg], seed)

    def backward_from(
        self,
        pulls: Pulls,
        output_seed: Tensor | None,
        targets: Sequence[GradientEdge | Tensor],
        *,
        create_graph: bool = False,
    ) -> tuple[Tensor | None, ...]:
        """`backward`, its seeds brought to the edges already."""
        roots: list[Any] = []
        vectors: list[Tensor] = []
        for edge, vector in pulls.values():
            roots.append(GradientEdge(*edge))
            vectors.append(vector)
        if output_seed is not None:
            roots.append(self.outputs)
            vectors.append(output_seed.to(self.outputs.dtype).reshape(self.outputs.shape))
        if not roots or not targets:
            return (None,) * len(targets)
        wanted: Any = list(targets)
        found: tuple[Tensor | None, ...] = torch.autograd.grad(
            roots, wanted, vectors, retain_graph=True, allow_unused=True, create_graph=create_graph
        )
        return found

    def remote(
        self, place: int, cotangent: Tensor, seeds: Sequence[Tensor | None] | Mapping[int, Tensor | None]
    ) -> Tensor:
        """A layer's cotangent without what the seeds of the sites that it feeds directly put into it."""
        direct = self.direct.get(place)
        seed = None if direct is None else seeds[direct.site]
        if direct is None or seed is None:
            return cotangent
        return cotangent - seed.reshape(cotangent.shape) * direct.slope

    def together(self, places: Collection[int]) -> list[tuple[int, ...]]:
        """Layers told apart by where their outputs have become summands of one and the same tensor."""
        layers = [*self.layers, *self.shared]
        found: dict[Key, tuple[int, ...]] = {}
        for place in sorted(places):
            key = junction(self.graph, layers[place])
            found[key] = (*found.get(key, ()), place)
        return list(found.values())

    @property
    def rowed(self) -> dict[int, Rowed]:
        """By layer, sites that mix rows of which its share is closed."""
        if self._rowed is None:
            squares = [layer.on(self.samples) for layer in self.layers]
            self._rowed = find_rowed(self.graph, self.sites, squares)
        return self._rowed

    def own_weight(self, place: int) -> Tensor:
        """Weights on a layer's output that give its share of such sites."""
        rowed = self.rowed[place]
        total = torch.zeros(edge_shape(rowed.edge), dtype=self.outputs.dtype, device=self.outputs.device)
        for number in rowed.sites:
            factor = self.sites[number].legs[0][1]
            assert isinstance(factor, Map)
            total += factor.squared(self.sites[number].c)
        found = carried(self.layers[place], rowed.edge, total)
        assert found is not None
        return found

    def own(self, pulls: Pulls, *, halves: bool = True) -> dict[int, Tensor]:
        """By layer, what its cotangent holds of seeds whose share is known: of sites that mix rows, and (`halves`) of
        pairs of which it feeds one half alone.
        """
        known, found = self._known(halves), dict[int, Tensor]()
        for together, places in {known[pull][0]: known[pull][1] for pull in pulls if pull in known}.items():
            given = [pulls[pull] for pull in together if pull in pulls]  # on one edge
            parts = torch.autograd.grad(
                [GradientEdge(*given[0][0])],
                [self.layers[place].edge for place in places],
                [sum((vector for _, vector in given[1:]), given[0][1])],
                retain_graph=True,
                allow_unused=True,
            )
            for (place, kept), part in zip(places.items(), parts):
                if part is not None:
                    share = part if isinstance(kept, float) else part * kept
                    found[place] = share if place not in found else found[place] + share
        return found

    def _known(self, halves: bool) -> dict[Pull, tuple[tuple[Pull, ...], dict[int, Tensor | float]]]:
        """By leg, all those on its edge of which a share is known, and by layer how much of what they put into it."""
        if halves not in self._shares:
            wanted: dict[tuple[Pull, ...], dict[int, Tensor | float]] = {}
            for place, rowed in self.rowed.items():
                wanted.setdefault(tuple((number, False, 0) for number in rowed.sites), {})[place] = 1.0
            for place, mine in find_own(self.graph, self.sites, self.layers).items() if halves and self._closed else ():
                for half in mine:
                    wanted.setdefault(((half.site, half.second, half.leg),), {})[place] = half.kept
            self._shares[halves] = {pull: known for known in wanted.items() for pull in known[0]}
        return self._shares[halves]

    def adjoints(self, edges: Sequence[Edge]) -> list[Tensor]:
        """dl/dh for the tensors h of `edges`, the loss summed over the batch."""
        if not edges:
            return []
        gradient = self.curvature.gradient_in(self.outputs.dtype).reshape(self.outputs.shape)
        found = torch.autograd.grad(
            [self.outputs],
            [GradientEdge(*edge) for edge in edges],
            [gradient],
            retain_graph=True,
            allow_unused=True,
        )
        return [
            torch.zeros(edge_shape(edge), dtype=gradient.dtype, device=gradient.device) if g is None else g
            for edge, g in zip(edges, found)
        ]

    def gradients(self, edges: Sequence[GradientEdge]) -> list[Tensor]:
        """dl/dt at `edges`, the loss summed over the batch, as functions that can be differentiated once more."""
        with torch.enable_grad():
            _, losses = self.objective.loss.in_double(self.outputs, self.targets)
            found = torch.autograd.grad([losses.sum()], list(edges), create_graph=True, allow_unused=True)
        return [
            torch.zeros(edge_shape((edge.node, edge.output_nr)), dtype=self.outputs.dtype, device=self.outputs.device)
            if g is None
            else g
            for edge, g in zip(edges, found)
        ]

    # -- construction

    def _find_sites(self, index: int) -> list[Site]:
        bends = [(kind, node, self._asked(kind, node)) for kind, node in self.graph.bends]
        adjoints = iter(self.adjoints([edge for _, _, edges in bends for edge in edges]))
        with torch.no_grad():
            raw = [
                _Bend(kind, node, {edge: next(adjoints) for edge in edges}, self._name(node))
                for kind, node, edges in bends
            ]
            for bend in raw:
                if not all(map(all_finite, bend.form.values())):
                    self._not_finite(index, bend.name)
            sites = self._merge(raw)
            sites += self._crossings(len(sites))
            seen = {id(c) for bend in raw for c in bend.form.values()}
            for site in sites:
                if id(site.c) not in seen and not all_finite(site.c):
                    self._not_finite(index, site.name)
            return sites

    def _asked(self, kind: type[SiteKind], node: Any) -> list[Edge]:
        """The edges whose adjoints a node's sites are made of: its outputs, or what alone it is given."""
        if kind.has_returned():
            below: Edge = node.next_functions[0]
            users = [user.next_functions[slot][1] for user, slot in self.graph.consumers(below[0])]
            if users.count(below[1]) == 1 and not is_leaf(below[0]):
                return [below]
        return [(node, number) for number in kind.outputs(node)]

    def _crossings(self, first: int) -> list[Site]:
        """Bilinear terms of shared layers whose input depends on what they apply."""
        places = [n for n, layer in enumerate(self.shared) if layer.kind.crossing(layer) and self.graph.crosses(layer)]
        found: list[Site] = []
        for place, adjoint in zip(places, self.adjoints([(self.shared[place].node, 0) for place in places])):
            layer = self.shared[place]
            c, legs, right = layer.on(self.samples).cross(adjoint)
            self.crossing[first + len(found)] = place
            found.append(Site(self._name(layer.node), c, legs, right))
        return found

    @cached_property
    def heads(self) -> dict[int, Direct]:
        """What layers have in the outputs themselves, by their place in `layers` and beyond them in `shared`, where no
        two outputs that a parameter touches bend together.
        """
        columns, end = self.curvature.columns, (self.outputs.grad_fn, self.outputs.output_nr)
        if not columns.apart:
            return {}
        found = find_direct(self.graph, {edge_key(end): 0}, [*self.layers, *self.shared])
        computed = {key for key, known in self.graph.applied.items() if known.computed}
        heads = {}
        for place, direct in found.items():
            layer = [*self.layers, *self.shared][place]
            if not computed & set(layer.own) and layer.kind.one_output(layer, columns.places):
                heads[place] = direct
        return heads

    def _not_finite(self, index: int, where: str) -> NoReturn:
        raise NonFiniteError(f"batch {index}: {where} has NaN or Inf curvature")

    def _merge(self, raw: list[_Bend]) -> list[Site]:
        """Sites of all nodes; those whose inputs are functions of one tensor, entry by entry, become sites of it."""
        bases = [[self._base(edge) for edge in bend.edges] for bend in raw]
        count: dict[Key, int] = {}
        for found in bases:
            for key in {edge_key(edge) for edge, _ in found}:
                count[key] = count.get(key, 0) + 1
        merged: dict[Key, tuple[str, Edge, Tensor]] = {}
        sites: list[Site] = []
        for bend, found in zip(raw, bases):
            edge = found[0][0] if found else None
            alone = edge is None or (len(found) == 1 and count[edge_key(edge)] == 1)
            if alone or len({edge_key(edge) for edge, _ in found}) > 1:
                sites += self._sites(bend)
                continue
            assert edge is not None
            slopes = {slot: slope for slot, (_, slope) in zip(bend.slots, found)}
            weight: Tensor | None = None
            for (i, j), c in bend.form.items():
                part = c * slopes[i] * (slopes[i] if i == j else 2 * slopes[j])
                weight = part if weight is None else weight + part
            if weight is None or tuple(weight.shape) != tuple(edge_shape(edge)):
                sites += self._sites(bend)
                continue
            old = merged.get(edge_key(edge))
            name, weight = (bend.name, weight) if old is None else (old[0], old[2] + weight)
            merged[edge_key(edge)] = (name, edge, weight)
        sites += [Site(name, c, ((edge, 1.0),)) for name, edge, c in merged.values()]
        return sites

    def _sites(self, bend: _Bend) -> list[Site]:
        if issubclass(bend.kind, Pointwise) and len(bend.slots) == 1:
            return [Site(bend.name, bend.form[bend.slots[0], bend.slots[0]], ((bend.edges[0], 1.0),))]
        if bend.below is not None:
            return bend.kind.returned(bend.node, bend.below, bend.name)
        return bend.kind.written(bend.node, bend.adjoints, bend.name)

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
        if Elementwise.takes(node):
            return derivatives(node)[0], 0
        live = [slot for slot, (source, _) in enumerate(node.next_functions) if self.graph.is_live(source)]
        if len(live) != 1 or is_leaf(node.next_functions[live[0]][0]):
            return None
        if self.graph.is_layer(node):
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
        return f"{short_name(node)} {self.graph.place(node)}"
