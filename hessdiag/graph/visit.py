"""A backward pass that hands over each layer's cotangent as soon as it is whole, and keeps none.

What `Linearisation.backward` returns are the cotangents of all layers at once, as many bytes as all their outputs.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hessdiag.graph.linearise import Linearisation, Pulls

Visitor = Callable[[int, Tensor], None]


def visit(batch: Linearisation, pulls: Pulls, output_seed: Tensor | None, visitor: Visitor) -> None:
    """Call `visitor(place, cotangent)` once for every layer that the roots reach.

    `place` is its index in `layers`, and beyond them in `shared`. Roots are those of `Linearisation.backward_from`. The
    pass goes down to the layers with none below them, and so through all the others.
    """
    layers = [*batch.layers, *batch.shared]
    first = [place for place, layer in enumerate(layers) if batch.graph.is_first(layer)]
    handles = []
    try:
        for place in set(range(len(layers))) - set(first):
            handles.append(layers[place].node.register_prehook(_teller(place, visitor)))
        edges = [layers[place].edge for place in first]
        found = batch.backward_from(pulls, output_seed, edges)
    finally:
        for handle in handles:
            handle.remove()
    for place, cotangent in zip(first, found):
        if cotangent is not None:
            visitor(place, cotangent)


def _teller(place: int, visitor: Visitor) -> Callable[[tuple[Tensor | None, ...]], None]:
    def hook(cotangents: tuple[Tensor | None, ...]) -> None:
        if cotangents[0] is not None:
            visitor(place, cotangents[0])

    return hook
