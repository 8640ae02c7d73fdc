"""Reading a model's autograd graph: which nodes are affine, where it bends, and which nodes apply each parameter.

Below the layers stands what is computed from parameters alone, the *free* side: a weight turned, seen through a view,
divided by its length, a table of places looked up. It has no samples. Nodes there are affine or bend like any other,
and a layer may apply what comes out of them in the place of a parameter. What one node alone applies is its layer's own
(`layers`), as it stands or by way of a view, a choice or a factor (`hessdiag.graph.carried`). A parameter that several
nodes apply, or one behind any other computation, is *shared* (`shared`: the nodes that apply it, by the names of what
they apply).

Between the chosen parameters and the outputs every node must be known: as that of a layer kind (`layers.KINDS`), of a
site kind (`sites.KINDS`), or as affine, by its name. A node of torch's own that no list names is tested: its backward
says whether it is affine, or how it bends (`sites.tested`). Anything else - custom code that is no activation by name
or by test, kernels without a second derivative - raises UncoveredModelError with its name and place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from hessdiag.errors import StochasticModeError, UncoveredModelError
from hessdiag.graph import layers, saved, sites
from hessdiag.graph.carried import Carried, read
from hessdiag.graph.dependence import Live
from hessdiag.graph.layers import Layer
from hessdiag.graph.layers.source import Source
from hessdiag.graph.moves import forward
from hessdiag.graph.nodes import (
    AFFINE,
    INDEXED,
    RANDOM,
    RANDOM_IN_TRAINING,
    Edge,
    edge_key,
    edge_shape,
    is_leaf,
    short_name,
    sizes,
)
from hessdiag.graph.sites import SiteKind
from hessdiag.graph.sites.tested import Tested
from hessdiag.problem.sparse import stored


@dataclass(frozen=True)
class Applied:
    """Something of the free side that layers apply: `edge`, computed from the parameters `names`."""

    key: str
    edge: Edge
    names: tuple[str, ...]

    @property
    def computed(self) -> bool:
        """False for a parameter as it stands."""
        return not is_leaf(self.edge[0])


class Graph(Live):
    """The part of an autograd graph between chosen parameters and outputs, classified, in forward order.

    After construction: `layers` and `shared`; `applied`, what layers apply, by its key; `bends`, the nodes whose second
    derivative need not vanish, with their kinds, in the order of the table; and `unused`, the names of parameters that
    do not reach the outputs.
    """

    def __init__(self, outputs: Tensor, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(outputs, parameters)
        self.layers: list[Layer] = []
        self.shared: list[Layer] = []
        self.applied: dict[str, Applied] = {}
        self._layer_nodes: set[int] = set()
        self._free = {id(node) for node in self.nodes if is_leaf(node) and self.is_live(node)}
        self._found: dict[str, list[Any]] = {}
        for node in self.nodes:
            if self.is_live(node) and not is_leaf(node):
                self._classify(node)
        self.bends: list[tuple[type[SiteKind], Any]] = [
            (kind, node) for kind in sites.KINDS for node in self._found.get(kind.name, []) if kind.bends(node)
        ]
        reached = {name for layer in self.layers for key in layer.own for name in self.applied[key].names}
        self._tell_apart()
        self.unused = tuple(name for name in parameters if name not in reached)
        self._check_all_uses(reached)

    def of_kind(self, name: str) -> list[Any]:
        """The nodes of one kind of site, curved or not."""
        return self._found.get(name, [])

    def is_layer(self, node: Any) -> bool:
        """True for the node of a layer."""
        return id(node) in self._layer_nodes

    def is_first(self, layer: Layer) -> bool:
        """True if no other layer stands below this one."""
        return not any(self._below.get(id(source)) for source, _ in layer.node.next_functions if source is not None)

    @property
    def shared_names(self) -> list[str]:
        """Parameters behind what shared layers apply."""
        found = {name for layer in self.shared for key in layer.own for name in self.applied[key].names}
        return [name for name in self.names_below(self.outputs.grad_fn) if name in found]

    def owners(self) -> list[Layer]:
        """Every parameter once: the layers, and for each shared parameter a layer that applies it."""
        rest = []
        for name in self.shared_names:
            using = (layer for layer in self.shared if any(name in self.applied[key].names for key in layer.own))
            rest.append(replace(next(using), weight=name, bias=None))
        return [*self.layers, *rest]

    # -- for kinds of layers and sites

    def is_free(self, node: Any) -> bool:
        """True for what is computed from chosen parameters alone, and so is the same for every sample."""
        return node is not None and id(node) in self._free

    def direct(self, node: Any, slot: int) -> str | None:
        """What feeds `slot` of `node`, by its key, if that is a chosen parameter or computed from such alone."""
        if slot >= len(node.next_functions):
            return None
        edge: Edge = node.next_functions[slot]
        if not self.is_live(edge[0]):
            return None
        if not self.is_free(edge[0]):
            self.refuse(node, f"a weight that depends on the inputs and on parameter {self.through(edge[0])!r}")
        return self.apply(edge)

    def apply(self, edge: Edge) -> str:
        """The key of something of the free side that a layer applies: the name of a parameter, if it is one."""
        name = self.parameter_of(edge[0])
        if name is not None:
            self.applied.setdefault(name, Applied(name, edge, (name,)))
            return name
        for known in self.applied.values():
            if edge_key(known.edge) == edge_key(edge):
                return known.key
        names = tuple(self.names_below(edge[0]))
        key = f"{names[0]} through {short_name(edge[0])}"
        while key in self.applied:
            key += "'"
        self.applied[key] = Applied(key, edge, names)
        return key

    def carried(self, node: Any, slot: int) -> list[Carried]:
        """The ways by which parameters make up the input `slot` of a node; none where samples enter it.

        What is used elsewhere too, mixed or bent on its way is carried as it is, under a key of its own.
        """
        edge: Edge = node.next_functions[slot]
        if not self.is_free(edge[0]):
            return []
        ways = [] if is_leaf(edge[0]) else self._ways(slot, edge)
        shape = edge_shape(edge)
        return ways or [Carried(self.apply(edge), slot, shape, shape)]

    def layer_name(self, *parameters: str | None) -> str:
        """What a layer of these parameters is called: by its module."""
        first = self.applied[next(name for name in parameters if name)].names[0]
        return first.rpartition(".")[0] or first

    def crosses(self, layer: Layer) -> bool:
        """Whether what a layer is given depends on a parameter behind what it applies."""
        known = [self.applied[key] for key in layer.own]
        own = {edge_key(one.edge) for one in known}
        names = {name for one in known for name in one.names}
        given = [source for source, number in layer.node.next_functions if edge_key((source, number)) not in own]
        return any(
            self.is_live(source) and not self.is_free(source) and names & set(self.names_below(source))
            for source in given
        )

    # -- construction

    def _classify(self, node: Any) -> None:
        sources = [source for source, _ in node.next_functions]
        self._below[id(node)] = next((self._below[id(s)] for s in sources if id(s) in self._below), "")
        if node.name() in RANDOM or (node.name() in RANDOM_IN_TRAINING and saved.flag(node, "training")):
            raise StochasticModeError(f"active dropout {self.place(node)}; call model.eval()")
        if self._stays_free(node):
            self._free.add(id(node))
            if not any(kind.carries(node, self) for kind in layers.KINDS) and not self._is_site(node):
                self._test(node)
        elif self._is_layer(node):
            if any(layer.node is node and layer.kind.bends for layer in self.layers):
                self._is_site(node)
        elif not self._is_source(node) and not self._is_site(node):
            self._test(node)

    def _is_layer(self, node: Any) -> bool:
        for kind in layers.KINDS:
            if not kind.takes(node):
                continue
            if found := kind.match(node, self):
                for layer in found if isinstance(found, list) else [found]:
                    self._add(layer)
                return True
            if kind.sole:
                return True
        return False

    def _add(self, layer: Layer) -> None:
        self.layers.append(layer)
        self._layer_nodes.add(id(layer.node))
        self._below[id(layer.node)] = layer.name

    def _is_source(self, node: Any) -> bool:
        """Where a parameter is handed to the samples, each a row of its own, and no kind of layer claims it."""
        live = [edge for edge in node.next_functions if self.is_live(edge[0])]
        shape = edge_shape((node, 0))
        if not all(self.is_free(source) for source, _ in live) or not shape or shape[0] % len(self.outputs):
            return False
        bent = [kind.bends(node) for kind in sites.KINDS.of(node) if kind.match(node, self)]
        affine = not any(bent) and (bool(bent) or node.name() in AFFINE or not Tested.match(node, self))
        ways = (self._ways(0, (node, 0)) or self._handed_out(node, live)) if affine else []
        for way in ways:
            self._add(Layer(Source, way.name, node, way.name, None, carried=way))
        return bool(ways)

    def _handed_out(self, node: Any, live: list[Edge]) -> list[Carried]:
        """What is computed from parameters, and handed to the samples by this one node."""
        if len(live) != 1:
            return []
        slot, own = node.next_functions.index(live[0]), edge_shape(live[0])
        found = read(lambda tangents: forward(node, slot, live[0], 0, tangents), own, sizes(*live[0]))
        return [] if found is None else [Carried(self.apply(live[0]), slot, own, edge_shape((node, 0)), *found)]

    def _tell_apart(self) -> None:
        """Cut what several nodes apply, and what is computed first, out of `layers` into `shared`."""
        uses = Counter(key for layer in self.layers for key in layer.own)
        computed = {name for known in self.applied.values() if known.computed for name in known.names}
        own = {key for key, count in uses.items() if count == 1 and not self.applied[key].computed} - computed
        together = self.layers
        self.layers = [part for part in (layer.part(own) for layer in together) if part.own]
        self.shared = [part for part in (layer.part(uses.keys() - own) for layer in together) if part.own]

    # -- what has no samples

    def _stays_free(self, node: Any) -> bool:
        """Whether a node's output is of the free side: its live inputs are, and no sample enters by another way.

        A constant operand may hold something of each sample. Its shape tells as a rule; where it does not, gradients
        from one half of the samples and from the other do: what both reach is the same for all samples.
        """
        if not all(self.is_free(source) for source, _ in node.next_functions if self.is_live(source)):
            return False
        constant = any(
            not self.is_live(source) and not _is_number(node, slot)
            for slot, (source, _) in enumerate(node.next_functions)
        )
        shape, samples = edge_shape((node, 0)), len(self.outputs)
        if not (constant or node.name() in INDEXED) or not shape or shape[0] % samples:
            return True
        if samples > 1 and any(kind.enters(node, self) for kind in layers.KINDS.of(node)):
            return id(node) in self._for_all
        return self._meets_all(node) if samples > 1 else id(node) in self._ending_in_weights

    @cached_property
    def _ending_in_weights(self) -> set[int]:
        """Nodes of which all that is computed is applied to something else (of one sample both serve)."""
        found: set[int] = set()
        for node in reversed(self.nodes):
            users = self.consumers(node)
            if users and all(id(user) in found or _is_applied(user, slot) for user, slot in users):
                found.add(id(node))
        return found

    @cached_property
    def _for_all(self) -> set[int]:
        """Nodes that are given a constant and whose output all samples use: places, coordinates, a fixed matrix.

        Where all of them are given one tensor, that holds the samples: they must enter somewhere.
        """
        samples, nodes, given = len(self.outputs), [], set()
        for node in self.nodes:
            if is_leaf(node) or not self.is_live(node):
                continue
            kind = next((kind for kind in layers.KINDS.of(node) if kind.enters(node, self)), None)
            shape = edge_shape((node, 0))
            if kind is not None and shape and shape[0] % samples == 0:
                constant = kind.constant(node)
                nodes.append(node)
                given.add(id(node) if constant is None else stored(constant)[0].untyped_storage().data_ptr())
        if len(given) < 2:
            return set()
        halves = [self._reached(nodes, part) for part in self._halves()]
        return {id(node) for node, one, other in zip(nodes, *halves) if _meet(one, other)}

    def _halves(self) -> list[Tensor]:
        """Cotangents of the outputs from one half of the samples and from the other."""
        wave = torch.cos(torch.arange(self.outputs.numel(), device=self.outputs.device) * 1.7 + 0.3)
        seed = wave.to(self.outputs.dtype).reshape(len(self.outputs), -1)
        half = (torch.arange(len(seed), device=seed.device) < len(seed) // 2)[:, None]
        return [(seed * part).reshape(self.outputs.shape) for part in (half, ~half)]

    def _reached(self, nodes: list[Any], seed: Tensor) -> tuple[Tensor | None, ...]:
        edges = [GradientEdge(node, 0) for node in nodes]
        found: tuple[Tensor | None, ...] = torch.autograd.grad(
            self.outputs, edges, seed, retain_graph=True, allow_unused=True
        )
        return found

    def _meets_all(self, node: Any) -> bool:
        found = [self._reached([node], part)[0] for part in self._halves()]
        if not all(g is not None and bool(g.any()) for g in found):  # a branch that starts at zero, say
            return id(node) in self._ending_in_weights
        return _meet(*found) or not self._first(*found)

    def _first(self, one: Tensor | None, other: Tensor | None) -> bool:
        """Whether gradients from the halves of the samples lie in their rows: else samples are on another axis."""
        samples = len(self.outputs)
        below = one is not None and bool(one.reshape(samples, -1)[samples // 2 :].any())
        return not below and not (other is not None and bool(other.reshape(samples, -1)[: samples // 2].any()))

    # -- parameters on their way

    def _ways(self, slot: int, end: Edge) -> list[Carried]:
        """How the parameters below `end` make it up, entry by entry; none where one serves elsewhere, too, or mixes."""
        ways = []
        for name in self.names_below(end[0]):
            way = self._way(slot, end, self.leaf(name))
            if way is None:
                return []
            ways.append(way)
        for way in ways:
            self.apply((self.leaf(way.name), 0))
        return ways

    def _way(self, slot: int, end: Edge, leaf: Any) -> Carried | None:
        name, own, edge = self.parameter_of(leaf), edge_shape((leaf, 0)), (leaf, 0)
        assert name is not None
        steps: list[tuple[Any, int, Edge, int]] = []
        while edge[0] is not end[0]:
            users = self.consumers(edge[0])
            if len(users) != 1 or self._bends(users[0][0]):
                return None
            user, place = users[0]
            output = end[1]
            if user is not end[0]:
                above = self.consumers(user)
                if len(above) != 1:
                    return None
                output = above[0][0].next_functions[above[0][1]][1]
            steps.append((user, place, edge, output))
            edge = (user, output)
        if len(self.consumers(end[0])) > 1 and self.is_free(end[0]):
            return None

        def moved(tangents: Tensor) -> Tensor:
            for step, place, below, output in steps:
                tangents = forward(step, place, below, output, tangents)
            return tangents

        found = read(moved, own, leaf.variable)
        return None if found is None else Carried(name, slot, own, edge_shape(end), *found)

    def _bends(self, node: Any) -> bool:
        return any(
            kind.bends(node) for kind in sites.KINDS if any(node is known for known in self._found.get(kind.name, ()))
        )

    # -- sites, and what is left

    def _is_site(self, node: Any) -> bool:
        for kind in sites.KINDS.of(node):
            if kind.match(node, self):
                self._refuse_parameters(node)
                self._refuse_complex(node)
                self._found.setdefault(kind.name, []).append(node)
                return True
        return False

    def _test(self, node: Any) -> None:
        """What is left is affine by its name or by test, or a site by test, or refused."""
        self._refuse_parameters(node)
        if node.name() not in AFFINE and Tested.match(node, self):
            self._refuse_complex(node)
            self._found.setdefault(Tested.name, []).append(node)

    def _refuse_parameters(self, node: Any) -> None:
        """Where something of the free side meets samples at a node that is no layer."""
        if self.is_free(node):
            return
        own = {edge_key(self.applied[key].edge) for key in self.layers[-1].own} if self.is_layer(node) else set()
        for source, number in node.next_functions:
            if self.is_free(source) and edge_key((source, number)) not in own:
                self.refuse(node, f"parameter {self.through(source)!r} is not the weight or bias of a known layer")

    def _refuse_complex(self, node: Any) -> None:
        edges = [
            *((node, number) for number in self.outputs_in_use(node)),
            *(edge for edge in node.next_functions if self.is_live(edge[0])),
        ]
        if any(sizes(*edge).dtype.is_complex for edge in edges):
            self.refuse(node, "a function of complex numbers that is not affine")

    def _check_all_uses(self, reached: set[str]) -> None:
        order = {id(node): place for place, node in enumerate(self.nodes)}
        left = [
            (order[id(self._uses[id(node)][0][0])], str(self.parameter_of(node)))
            for node in self.nodes
            if self.is_live(node) and is_leaf(node) and self.parameter_of(node) not in reached
        ]
        if left:
            place, name = min(left)
            why = "is not the weight or bias of a known layer"
            if self.is_free(self.outputs.grad_fn):
                why = "meets samples that do not lie on the first axis"
            self.refuse(self.nodes[place], f"parameter {name!r} {why}")


def _meet(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether some entry is reached from both halves of the samples."""
    return one is not None and other is not None and bool(((one != 0) & (other != 0)).any())


def _is_applied(user: Any, slot: int) -> bool:
    """Whether a slot of a node is that of a layer's weight or bias."""
    given = [kind.given(user) for kind in layers.KINDS.of(user) if kind.sole]
    return bool(given) and slot not in given


def _is_number(node: Any, slot: int) -> bool:
    """Whether a product or a quotient has one number in a slot, the same for all samples."""
    if node.name() not in ("MulBackward0", "DivBackward0"):
        return False
    kept = saved.tensor_or_none(node, ("self", "other")[slot])
    return kept is not None and kept.ndim == 0


def detach_guard(outputs: Tensor) -> None:
    """Refuse outputs that do not depend on any parameter."""
    if outputs.grad_fn is None:
        raise UncoveredModelError(
            "the outputs do not depend on the chosen parameters (no autograd graph): does the model run under no_grad?"
        )


def rounding_guard(ends: Tensor, parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuse what rounds to less than float32 between chosen parameters and `ends`; below all of them it may."""
    live = Live(ends, parameters)
    for node in live.nodes:
        if not live.is_live(node) or is_leaf(node):
            continue
        for dtype in (meta.dtype for meta in node._input_metadata):
            if dtype.is_floating_point and dtype.itemsize < 4:
                raise UncoveredModelError(
                    f"what the model computes from parameter {live.through(node)!r} is rounded to "
                    f"{str(dtype).removeprefix('torch.')} ({short_name(node)}), and no method here measures what is "
                    "rounded: call model.float(), which converts frozen parts too, or choose parameters that come "
                    "after it (parameters=...)"
                )
