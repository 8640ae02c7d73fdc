"""A backward pass that takes in its cotangents, and hands over each layer's, one by one.

What `Linearisation.backward` is given are the cotangents of all edges that sites look at, as many bytes as the forward
pass and more; what it returns are those of all layers at once, as many as all their outputs. Here a cotangent is asked
for when the pass comes to its node, and that of a layer is whole at its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from hessdiag.graph.linearise import Linearisation
from hessdiag.graph.nodes import Edge, edge_shape, sizes

Visitor = Callable[[int, Tensor], None]
Source = Callable[[], Mapping[int, Tensor]]
"""Cotangents that enter at a node, by the number of its output."""
Sources = Mapping[int, tuple[Any, Source]]
"""Nodes, by their id, and what enters there."""


def visit(batch: Linearisation, sources: Sources, visitor: Visitor) -> None:
    """Call `visitor(place, cotangent)` once for every layer that the sources reach.

    `place` is its index in `layers`, and beyond them in `shared`. Sources may run passes of their own. The pass goes
    down to the layers with none below them, and so through all the others.
    """
    layers = [*batch.layers, *batch.shared]
    first = [place for place, layer in enumerate(layers) if batch.graph.is_first(layer)]
    ends = {id(layers[place].node) for place in first}  # hooks there come after what is returned
    roots: list[tuple[Edge, Tensor]] = []
    handles, state = [], _State()
    try:
        for key, (node, source) in sources.items():
            if key in ends:
                roots += [((node, number), cotangent) for number, cotangent in source().items()]
            else:
                handles.append(node.register_prehook(_taker(source, state)))
        for place in set(range(len(layers))) - set(first):
            handles.append(layers[place].node.register_prehook(_teller(place, visitor, state)))
        state.blanks = {edge: _blank(edge) for edge in _tops(batch, sources, ends)}
        roots += state.blanks.items()
        if not roots:
            return
        found = torch.autograd.grad(
            [GradientEdge(*edge) for edge, _ in roots],
            [layers[place].edge for place in first],
            [cotangent for _, cotangent in roots],
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

    blanks: Mapping[Edge, Tensor] = {}
    """Zeros at the nodes from which the others are reached."""
    within = False
    """Whether a source runs: passes of its own meet the same nodes."""


def _tops(batch: Linearisation, sources: Sources, ends: set[int]) -> list[Edge]:
    """An edge at every node where something enters but that no other such node leads to."""
    reached, found = set[int](), []
    for node in reversed(batch.graph.nodes):
        if id(node) not in reached:
            if id(node) not in sources or id(node) in ends:
                continue
            found.append((node, 0))
        reached.update(id(source) for source, _ in node.next_functions)
    return found


def _blank(edge: Edge) -> Tensor:
    """A zero that takes no memory."""
    meta = sizes(*edge)
    return torch.zeros((), dtype=meta.dtype, device=meta.device).expand(edge_shape(edge))


Cotangents = tuple["Tensor | None", ...]


def _taker(source: Source, state: _State) -> Callable[[Cotangents], Cotangents | None]:
    def hook(cotangents: Cotangents) -> Cotangents | None:
        if state.within:
            return None
        state.within = True
        try:
            entering = source()
        finally:
            state.within = False
        return tuple(_joined(one, entering.get(number), state) for number, one in enumerate(cotangents))

    return hook


def _joined(known: Tensor | None, entering: Tensor | None, state: _State) -> Tensor | None:
    if known is None or entering is None:
        return known if entering is None else entering
    return entering if any(known is blank for blank in state.blanks.values()) else known + entering


def _teller(place: int, visitor: Visitor, state: _State) -> Callable[[Cotangents], None]:
    def hook(cotangents: Cotangents) -> None:
        if cotangents[0] is not None and not state.within:
            visitor(place, cotangents[0])

    return hook
