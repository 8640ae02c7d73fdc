"""Parameters that are applied more than once, or computed first: gradients of single samples, summed over uses.

Along a parameter the tangent is the sum over its uses. So in each pass, and sample by sample, gradients are summed over
all uses (and positions) before they are squared, and what a layer applies in the place of a parameter hands its own
gradient down to the parameters that it is computed from. A node that applies a parameter to what depends on the same
parameter bends: 2 <g, d2a(dtheta, dx)>, a pair one half of which has its seeds on the parameter itself. They never
meet in autograd, which would sum over samples: they are added here (`LayerKind.cross`).

What is computed from parameters alone may bend, too. It has no samples: its sites are one sample by themselves.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from hessdiag.graph import Linearisation, edge_shape
from hessdiag.graph.chunks import chunk_samples
from hessdiag.graph.layers.layer import Half, LayerKind
from hessdiag.kernels.rows import Factors, Rows
from hessdiag.kernels.tensors import Tensors

Seeds = Sequence[Tensor | None]


class Uses:
    """The shared layers of one linearised batch, at work on any number of passes."""

    def __init__(self, batch: Linearisation) -> None:
        self.batch = batch
        self.known = batch.graph.applied
        factored = [
            layer.part([layer.weight] if layer.kind.factored() and layer.weight else []) for layer in batch.shared
        ]
        rest = [layer.part(set(layer.own) - set(first.own)) for layer, first in zip(batch.shared, factored)]
        self._factored = [layer.on(batch.samples) if layer.own else None for layer in factored]
        self._rest = [layer.on(batch.samples) if layer.own else None for layer in rest]
        shared = {name for layer in batch.shared for key in layer.own for name in self.known[key].names}
        self.parameters = {name: p for name, p in batch.objective.parameters.items() if name in shared}
        self.tables = Rows.found(batch)
        """By the place of their head, those of which no more than the rows looked up need be squared beside it."""

    def beyond_heads(
        self, heads: Mapping[int, Factors], deltas: Mapping[int, Tensor], right: Seeds, *, without: Collection[str] = ()
    ) -> Tensors:
        """{table: sum over samples of its squared gradient less that of its head's use alone}, for what `Rows.of_head`
        gave of a pass, by place, and the rest as in `squared`.
        """
        out: Tensors = {}
        for place, table in self.tables.items():
            if table.name in without:
                continue
            halves = []
            for number, seed in ((n, right[n]) for n, where in self.batch.crossing.items() if where == place):
                half = self.batch.sites[number].right[0][1]
                assert isinstance(half, Half)
                if seed is not None:
                    halves.append(table.of_half(half, seed))
            out[table.name] = table.beyond(heads.get(place), halves, deltas)
        return out

    def squared(self, deltas: Mapping[int, Tensor], right: Seeds, *, without: Collection[str] = ()) -> Tensors:
        """{parameter: sum over samples of its squared gradient} for cotangents of the shared layers, by their place.

        `right` are the seeds of the second halves of pairs, site by site. `without` names what is not asked for.
        """
        out: Tensors = {}
        for gradients in self._chunks(deltas, right, without):
            for name, each in gradients.items():
                square = each.square_().sum(0)
                out[name] = square if name not in out else out[name].add_(square)
        return out

    def each(self, deltas: Mapping[int, Tensor], right: Seeds) -> Tensors:
        """{parameter: its gradients, samples first}."""
        parts = list(self._chunks(deltas, right))
        return {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else ())}

    def _chunks(self, deltas: Mapping[int, Tensor], right: Seeds, without: Collection[str] = ()) -> Iterator[Tensors]:
        """Gradients of some samples at a time, as many as fit into memory; those of Linear uses in one product."""
        factors: dict[str, list[tuple[Tensor, Tensor]]] = {}
        rest: list[tuple[LayerKind, Tensor]] = []
        halves: list[tuple[str, Half, Tensor]] = []
        for place, delta in deltas.items():
            layer = self._factored[place]
            if layer is not None and layer.layer.weight and layer.layer.weight not in without:
                factors.setdefault(layer.layer.weight, []).append(layer.factors(delta))
            other = self._rest[place]
            if other is not None and not set(other.layer.own) <= set(without):
                rest.append((other, delta))
        for number, place in self.batch.crossing.items():
            seed, half = right[number], self.batch.sites[number].right[0][1]
            if seed is None:
                continue
            key = self.batch.shared[place].weight
            assert isinstance(half, Half)
            assert key is not None
            if key in without:
                continue
            if self._factored[place] is not None:
                factors.setdefault(key, []).append(half.factors(seed))
            else:
                halves.append((key, half, seed))
        joined = {key: tuple(torch.cat(side, -1) for side in zip(*parts)) for key, parts in factors.items()}
        samples, size = self.batch.samples, sum(p.numel() for n, p in self.parameters.items() if n not in without)
        outputs = self.batch.outputs
        step = chunk_samples(2 * size * outputs.element_size(), 1, outputs.device)
        for low in range(0, samples, step) if factors or rest or halves else ():
            high = min(low + step, samples)
            found: Tensors = {}
            for key, (left, turned) in joined.items():
                _add(found, key, left[low:high] @ turned[low:high].transpose(-1, -2))
            for layer, delta in rest:
                for key, value in layer.some(delta, low, high).items():
                    _add(found, key, value)
            for key, half, seed in halves:
                _add(found, key, half.some(seed, low, high))
            yield self._handed_down(found)

    def _handed_down(self, found: Tensors) -> Tensors:
        """Gradients of what was applied as gradients of parameters, each a tensor of its own."""
        out = {key: value for key, value in found.items() if not self.known[key].computed}
        for key, value in found.items():
            if self.known[key].computed:
                names = self.known[key].names
                for name, handed in zip(names, self._pulled(key, value, [self.parameters[name] for name in names])):
                    _add(out, name, handed)
        return out

    def _pulled(self, key: str, value: Tensor, wanted: list[Tensor]) -> list[Tensor]:
        """One backward pass below an edge of the free side, for all samples at once where its nodes allow that."""
        edge: Any = GradientEdge(*self.known[key].edge)
        seeds = value.reshape(-1, *edge_shape(self.known[key].edge))
        with contextlib.suppress(RuntimeError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.autograd.grad([edge], wanted, [seeds], retain_graph=True, is_grads_batched=True)
            return [g.detach() for g in found]
        rows = [torch.autograd.grad([edge], wanted, [one], retain_graph=True) for one in seeds]
        return [torch.stack(column).detach() for column in zip(*rows)]


def _add(found: Tensors, key: str, value: Tensor) -> None:
    found[key] = value if key not in found else found[key] + value.reshape(found[key].shape)
