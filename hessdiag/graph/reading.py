"""Reading a model's autograd graph: which nodes are affine, where it bends, and which node applies each parameter.

Between the chosen parameters and the outputs every node must be known: as that of a layer kind (`layers.KINDS`), of a
site kind (`sites.KINDS`), or as affine, by its name. A node of torch's own that no list names is tested: its backward
says whether it is affine, or how it bends (`sites.tested`). Anything else - scripted or custom code, a parameter used
twice or behind a parametrisation - raises UncoveredModelError with its name and place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hessdiag.errors import StochasticModeError, UncoveredModelError
from hessdiag.graph import layers, saved, sites
from hessdiag.graph.dependence import Live
from hessdiag.graph.layers import Layer
from hessdiag.graph.nodes import AFFINE, RANDOM, RANDOM_IN_TRAINING, is_leaf, sizes
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
        for node in self.nodes:
            if self.is_live(node) and not is_leaf(node):
                self._classify(node)
        self.bends: list[tuple[type[SiteKind], Any]] = [
            (kind, node) for kind in sites.KINDS for node in self._found.get(kind.name, []) if kind.bends(node)
        ]
        reached = {name for layer in self.layers for name in layer.own}
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
        if self._is_layer(node):
            if self.is_layer(node) and self.layers[-1].kind.bends:
                self._is_site(node)
        elif not self._is_site(node):
            self._test(node)

    def _is_layer(self, node: Any) -> bool:
        for kind in layers.KINDS:
            if kind.carries(node, self):
                return True
            if not kind.takes(node):
                continue
            layer = kind.match(node, self)
            if layer is not None:
                self.layers.append(layer)
                self._layer_nodes.add(id(node))
                self._below[id(node)] = layer.name
                return True
            if kind.sole:
                return True
        return False

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

    def _check_all_uses(self, reached: set[str]) -> None:
        for node in self.nodes:
            if self.is_live(node) and is_leaf(node):
                name = self.parameter_of(node)
                if name not in reached:
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
