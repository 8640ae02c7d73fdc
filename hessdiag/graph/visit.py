"""A backward pass that takes in its cotangents, and hands over each layer's, one by one.

What `Linearisation.backward` is given are the cotangents of all edges that sites look at, as many bytes as the forward
pass and more; what it returns are those of all layers at once, as many as all their outputs. Here a cotangent is asked
for when the pass comes to its node (or before, where time counts more), and that of a layer is handed over at its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge

from hessdiag.graph.linearise import Linearisation
from hessdiag.graph.nodes import Edge, Key, edge_key, edge_shape, sizes

Visitor = Callable[[int, Tensor], None]
Entry = tuple[Edge, Tensor, bool]
"""An edge, a cotangent that enters there, and whether it may be written over."""
Source = Callable[[Sequence[Any]], list[Entry]]
"""All that enters at some nodes."""


class Entrances:
    """Edges at which something enters a pass, read from the graph once for any number of passes."""

    def __init__(self, batch: Linearisation, edges: Iterable[Edge]) -> None:
        self.batch = batch
        self.layers = [*batch.layers, *batch.shared]
        self.first = [place for place, layer in enumerate(self.layers) if batch.graph.is_first(layer)]
        """Places of layers with no other below them."""
        self.numbers: dict[int, set[int]] = {}
        """By the id of a node, the numbers of the outputs at which something may enter."""
        self.nodes: list[Any] = []
        for node, number in edges:
            if id(node) not in self.numbers:
                self.nodes.append(node)
            self.numbers.setdefault(id(node), set()).add(number)
        self.ends = {id(self.layers[place].node) for place in self.first}
        """Nodes whose hooks come after what a pass returns."""

    @cached_property
    def tops(self) -> list[Edge]:
        """Those of the edges to which no other is sure to lead: a hook can put nothing in the place of None.

        A node that is given something gives something to all its inputs, but for a `torch.autograd.Function`.
        """
        reached, nodes, found = set[Key](), set[int](), list[Edge]()
        for node in reversed(self.batch.graph.nodes):
            numbers = () if id(node) in self.ends else self.numbers.get(id(node), ())
            alone = [(node, number) for number in numbers if (id(node), number) not in reached]
            found += alone
            if (alone or id(node) in nodes) and not isinstance(node, BackwardCFunction):
                reached.update(edge_key(edge) for edge in node.next_functions)
                nodes.update(id(source) for source, _ in node.next_functions)
        return found


def visit(entrances: Entrances, source: Source, visitor: Visitor, *, at_once: bool = False) -> None:
    """Call `visitor(place, cotangent)` once for every layer that what enters reaches.

    `place` is its index in `layers`, and beyond them in `shared`. `source` is called for each node when the pass comes
    to it, and may run passes of its own; `at_once` calls it for all of them first, which takes more memory and less
    time. The pass goes down to the layers with none below them, and so through all the others.
    """
    layers, first = entrances.layers, entrances.first
    early = entrances.nodes if at_once else [node for node in entrances.nodes if id(node) in entrances.ends]
    roots = [(edge, vector) for edge, vector, _ in source(early)] if early else []
    handles, state = [], _State()
    try:
        for node in () if at_once else entrances.nodes:
            if id(node) not in entrances.ends:
                handles.append(node.register_prehook(_taker(node, source, state)))
        for place in set(range(len(layers))) - set(first):
            handles.append(layers[place].node.register_prehook(_teller(place, visitor, state)))
        if not at_once:
            state.blanks = [_blank(edge) for edge in entrances.tops]
            roots += zip(entrances.tops, state.blanks)
        if not roots or not first:
            return
        found = torch.autograd.grad(
            [GradientEdge(*edge) for edge, _ in roots],
            [layers[place].edge for place in first],
            [vector for _, vector in roots],
            retain_graph=True,
            allow_unused=True,
        )
    finally:
        for handle in handles:
            handle.remove()
    for place, cotangent in zip(first, found):
        if cotangent is not None:
            visitor(place, cotangent)


class _State:
    """What the hooks of one pass share."""

    blanks: Sequence[Tensor] = ()
    """Zeros at the edges from which the others are reached."""
    within = False
    """Whether a source runs: passes of its own meet the same nodes."""


def _blank(edge: Edge) -> Tensor:
    """A zero that takes no memory."""
    meta = sizes(*edge)
    return torch.zeros((), dtype=meta.dtype, device=meta.device).expand(edge_shape(edge))


Cotangents = tuple["Tensor | None", ...]


def _taker(node: Any, source: Source, state: _State) -> Callable[[Cotangents], Cotangents | None]:
    def hook(cotangents: Cotangents) -> Cotangents | None:
        if state.within:
            return None
        state.within = True
        try:
            entering = source([node])
        finally:
            state.within = False
        joined = [None if any(known is blank for blank in state.blanks) else known for known in cotangents]
        while entering:
            (_, number), vector, ours = entering.pop()
            vector, known = vector.to(sizes(node, number).dtype), joined[number]
            if known is not None:
                vector = vector.add_(known) if ours else vector + known
            joined[number] = vector
        return tuple(known if one is None else one for one, known in zip(joined, cotangents))

    return hook


def _teller(place: int, visitor: Visitor, state: _State) -> Callable[[Cotangents], None]:
    def hook(cotangents: Cotangents) -> None:
        if cotangents[0] is not None and not state.within:
            visitor(place, cotangents[0])

    return hook
