"""Reading a model's autograd graph: which nodes are affine, where it bends, and which node applies each parameter.

Between the chosen parameters and the outputs every node must be known: as that of a layer kind (`layers.KINDS`), of a
site kind (`sites.KINDS`), or as affine, by its name. A node of torch's own that no list names is tested: its backward
says whether it is affine, or how it bends (`sites.tested`). Anything else - scripted or custom code, a parameter used
twice or behind a parametrisation - raises UncoveredModelError with its name and place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from hessdiag.errors import StochasticModeError, UncoveredModelError
from hessdiag.graph import layers, saved, sites
from hessdiag.graph.carried import Carried, read
from hessdiag.graph.dependence import Live
from hessdiag.graph.layers import Layer
from hessdiag.graph.layers.broadcast import Broadcast
from hessdiag.graph.layers.source import Source
from hessdiag.graph.moves import forward
from hessdiag.graph.nodes import AFFINE, RANDOM, RANDOM_IN_TRAINING, Edge, edge_shape, is_leaf, sizes
from hessdiag.graph.sites import SiteKind
from hessdiag.graph.sites.tested import Tested


class Graph(Live):
    """The part of an autograd graph between chosen parameters and outputs, classified, in forward order.

    After construction: `layers`; `bends`, the nodes whose second derivative need not vanish, with their kinds, in the
    order of the table; and `unused`, the names of parameters that do not reach the outputs.
    """

    def __init__(self, outputs: Tensor, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(outputs, parameters)
        self.layers: list[Layer] = []
        self._layer_nodes: set[int] = set()
        self._found: dict[str, list[Any]] = {}
        self._carriers: set[int] = set()
        self._reached: set[str] = set()
        for node in self.nodes:
            if self.is_live(node) and not is_leaf(node):
                self._classify(node)
        self._hand_over(outputs.grad_fn, [(outputs.grad_fn, outputs.output_nr)])
        self.bends: list[tuple[type[SiteKind], Any]] = [
            (kind, node) for kind in sites.KINDS for node in self._found.get(kind.name, []) if kind.bends(node)
        ]
        self.unused = tuple(name for name in parameters if name not in self._reached)
        self._check_all_uses()

    def of_kind(self, name: str) -> list[Any]:
        """The nodes of one kind of site, curved or not."""
        return self._found.get(name, [])

    def is_layer(self, node: Any) -> bool:
        """True for the node of a layer."""
        return id(node) in self._layer_nodes

    def is_first(self, layer: Layer) -> bool:
        """True if no other layer stands below this one."""
        return not any(self._below.get(id(source)) for source, _ in layer.node.next_functions if source is not None)

    # -- for kinds of layers and sites

    def direct(self, node: Any, slot: int) -> str | None:
        """The chosen parameter that feeds `slot` of `node`; refused if something stands between, or used twice."""
        if slot >= len(node.next_functions):
            return None
        source = node.next_functions[slot][0]
        if not self.is_live(source):
            return None
        if not is_leaf(source):
            self.refuse(node, f"a weight computed from {self.through(source)!r} (a parametrisation)")
        name = self.parameter_of(source)
        if len(self._uses[id(source)]) > 1:
            self.refuse(node, f"parameter {name!r} used {len(self._uses[id(source)])} times")
        return name

    def carried(self, node: Any, slot: int) -> list[Carried]:
        """The ways of the parameters that the input `slot` of a node consists of; none where other things enter it."""
        edge = node.next_functions[slot]
        if is_leaf(edge[0]):
            name, shape = self.direct(node, slot), edge_shape(edge)
            return [Carried(name, slot, shape, shape)] if name else []
        if id(edge[0]) not in self._carriers:
            return []
        return [self._way(slot, edge, leaf) for leaf in self._leaves(edge[0])]

    def layer_name(self, *parameters: str | None) -> str:
        """What a layer of these parameters is called: by its module."""
        first = next(name for name in parameters if name)
        return first.rpartition(".")[0] or first

    # -- construction

    def _classify(self, node: Any) -> None:
        sources = [source for source, _ in node.next_functions]
        self._below[id(node)] = next((self._below[id(s)] for s in sources if id(s) in self._below), "")
        if node.name() in RANDOM or (node.name() in RANDOM_IN_TRAINING and saved.flag(node, "training")):
            raise StochasticModeError(f"active dropout {self.place(node)}; call model.eval()")
        if self._is_carrier(node):
            self._carriers.add(id(node))
            return
        known = self._is_layer(node)
        self._hand_over(node, node.next_functions)
        if known:
            if any(layer.node is node and layer.kind.bends for layer in self.layers):
                self._is_site(node)
        elif not self._is_site(node):
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
        self._reached |= set(layer.own)
        self._layer_nodes.add(id(layer.node))
        self._below[id(layer.node)] = layer.name

    # -- parameters on their way

    def _is_carrier(self, node: Any) -> bool:
        """Whether a node takes nothing live but parameters on their way, is affine in them, and no layer's."""
        if any(kind.carries(node, self) for kind in layers.KINDS):
            return True
        live = [edge for edge in node.next_functions if self.is_live(edge[0])]
        if not all(is_leaf(source) or id(source) in self._carriers for source, _ in live):
            return False
        out = edge_shape((node, 0))
        for kind in layers.KINDS.of(node):
            if not issubclass(kind, Broadcast):
                return False
            rows = bool(out) and out[0] == self.outputs.shape[0]
            if rows and any(len(edge_shape(e)) < len(out) or edge_shape(e)[0] == 1 != out[0] for e in live):
                return False  # here samples come in
        try:
            bent = [kind.bends(node) for kind in sites.KINDS.of(node) if kind.match(node, self)]
            return not any(bent) and (bool(bent) or node.name() in AFFINE or not Tested.match(node, self))
        except UncoveredModelError:
            return False  # refused in its turn

    def _leaves(self, carrier: Any) -> list[Any]:
        """The parameters' nodes below a node that carries them."""
        found: list[Any] = []
        stack = [carrier]
        while stack:
            node = stack.pop()
            if is_leaf(node):
                found += [] if node in found else [node]
            else:
                stack += [source for source, _ in node.next_functions if self.is_live(source)]
        return found

    def _way(self, slot: int, end: Edge, leaf: Any) -> Carried:
        """How the parameter of `leaf` becomes what `end` stands for: one step after the other, none taken twice."""
        name, own, edge = self.parameter_of(leaf), edge_shape((leaf, 0)), (leaf, 0)
        assert name is not None
        steps: list[tuple[Any, int, Edge, int]] = []
        while edge[0] is not end[0]:
            user, place = self._user(edge[0], name)
            output = end[1]
            if user is not end[0]:
                above, there = self._user(user, name)
                output = above.next_functions[there][1]
            steps.append((user, place, edge, output))
            edge = (user, output)
        if self.consumers(end[0]):
            self._user(end[0], name)

        def moved(tangents: Tensor) -> Tensor:
            for step, place, below, output in steps:
                tangents = forward(step, place, below, output, tangents)
            return tangents

        found = read(moved, own, leaf.variable)
        if found is None:
            self.refuse(end[0], f"a weight that mixes entries of {name!r} (a parametrisation)")
        return Carried(name, slot, own, edge_shape(end), *found)

    def _user(self, node: Any, name: str) -> tuple[Any, int]:
        """What takes a node's output, and by which input; refused if there are several."""
        users = self.consumers(node)
        if len(users) > 1:
            self.refuse(users[0][0], f"parameter {name!r} used {len(users)} times")
        return users[0]

    def _hand_over(self, node: Any, edges: Sequence[Edge]) -> None:
        """Parameters that come to a node and belong to no layer there are layers by themselves, if rows are samples."""
        for slot, edge in enumerate(edges):
            source = edge[0]
            if id(source) not in self._carriers or id(source) in self._layer_nodes:
                continue
            for leaf in self._leaves(source):
                name = self.parameter_of(leaf)
                assert name is not None
                if name in self._reached:
                    continue
                shape = edge_shape((source, 0))
                if not shape or shape[0] % self.outputs.shape[0]:
                    self.refuse(node, f"a weight computed from {name!r} (a parametrisation)")
                self._add(Layer(Source, name, source, name, None, carried=self._way(slot, edge, leaf)))

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
        own = self.layers[-1].own if self.is_layer(node) else ()
        for source, _ in node.next_functions:
            if is_leaf(source) and self.is_live(source) and self.parameter_of(source) not in own:
                self.refuse(
                    node,
                    f"parameter {self.parameter_of(source)!r} is not the weight or bias of a known layer",
                )

    def _refuse_complex(self, node: Any) -> None:
        edges = [(node, 0), *(edge for edge in node.next_functions if self.is_live(edge[0]))]
        if any(sizes(*edge).dtype.is_complex for edge in edges):
            self.refuse(node, "a function of complex numbers that is not affine")

    def _check_all_uses(self) -> None:
        for node in self.nodes:
            if self.is_live(node) and is_leaf(node):
                name = self.parameter_of(node)
                if name not in self._reached:
                    self.refuse(
                        self._uses[id(node)][0][0],
                        f"parameter {name!r} is not the weight or bias of a known layer",
                    )


def detach_guard(outputs: Tensor) -> None:
    """Refuse outputs that do not depend on any parameter."""
    if outputs.grad_fn is None:
        raise UncoveredModelError(
            "the outputs do not depend on the chosen parameters (no autograd graph): does the model run under no_grad?"
        )
