"""The local Hessian of one node, contracted with its adjoint: how a node bends of which only its backward is known.

Let H be that matrix on the entries of all live inputs. Where it falls into blocks over the leading axes that all inputs
share (rows, the samples at the least), blocks of at most `LARGEST` entries are filled, one product with H per entry of
a block and all blocks at once, and H = V diag(c) V^T block by block: a site on dz = V^T du.

Products are autograd's, u -> d<pullback, v>/du. An input that is computed from another one carries that one's share
along, which is taken off: what autograd finds at u_i is h_i + sum over later inputs of (du_j/du_i)^T h_j.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from hessdiag.graph.nodes import Edge, edge_key, edge_shape, sizes
from hessdiag.graph.pullback import Recorded, random_like
from hessdiag.graph.sites.site import Legs, Map, Site

LARGEST = 256
"""Entries of a block beyond which it is not filled."""
BLOCKS = 1 << 26
"""Entries of all blocks together."""
APART = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Of the largest entries of a product with H, what may be left outside of the blocks."""


class Contracted:
    """H of one node for adjoints of its outputs; `order` gives the place of a node in the forward pass."""

    def __init__(self, node: Any, slots: Sequence[int], adjoints: Mapping[int, Tensor], order: dict[int, int]) -> None:
        self.slots = slots
        unique = {edge_key(node.next_functions[slot]): node.next_functions[slot] for slot in slots}
        self.edges: list[Edge] = sorted(unique.values(), key=lambda edge: order[id(edge[0])])
        self._recorded = Recorded(node, [adjoints.get(k) for k in range(len(node._input_metadata))], slots)
        self._which = [[edge_key(e) for e in self.edges].index(edge_key(node.next_functions[slot])) for slot in slots]
        self._recorded.edges = self.edges
        self.shapes = [torch.Size(edge_shape(edge)) for edge in self.edges]
        self.like = sizes(*self.edges[0])

    def times(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """H v, input by input."""
        found = self._recorded.along([vectors[which] for which in self._which])
        parts = [torch.zeros_like(v) if f is None else f for v, f in zip(vectors, found)]
        for later in range(len(parts) - 1, 0, -1):
            ends = [GradientEdge(*edge) for edge in self.edges[:later]]
            carried = torch.autograd.grad(
                [GradientEdge(*self.edges[later])], ends, [parts[later]], retain_graph=True, allow_unused=True
            )
            parts[:later] = [p if c is None else p - c for p, c in zip(parts, carried)]
        return parts

    def rows(self) -> int | None:
        """How many leading axes H does not mix; None where not even the first."""
        shared = 0
        while all(len(s) > shared and s[: shared + 1] == self.shapes[0][: shared + 1] for s in self.shapes):
            shared += 1
        drawn = [random_like(s, self.like.dtype, self.like.device, 2 + n) for n, s in enumerate(self.shapes)]
        whole = self.times(drawn)
        scale = max(float(w.abs().max()) for w in whole)
        for axes in range(shared, 0, -1):
            if all(self._is_apart(half, drawn, whole, scale) for half in self._halves(self.shapes[0][:axes])):
                return axes
        return None

    def _halves(self, lead: torch.Size) -> Iterator[Tensor]:
        """Halves of the rows by the digits of their numbers: any two rows are told apart by one of these."""
        numbers = torch.arange(lead.numel(), device=self.like.device).reshape(lead)
        for digit in range(max(lead.numel() - 1, 0).bit_length()):
            yield (numbers >> digit) % 2 > 0

    def _is_apart(self, half: Tensor, drawn: list[Tensor], whole: list[Tensor], scale: float) -> bool:
        """Whether half of the rows, by themselves, give what they give among all."""
        masks = [half.reshape(*half.shape, *(1,) * (len(s) - half.ndim)) for s in self.shapes]
        found = self.times([d * m for d, m in zip(drawn, masks)])
        return all(float((f - w * m).abs().max()) <= APART[f.dtype] * scale for f, w, m in zip(found, whole, masks))

    def site(self, name: str, axes: int) -> Site:
        """The blocks, filled and turned."""
        lead = self.shapes[0][:axes]
        widths = [prod(s[axes:]) for s in self.shapes]
        rows, total = prod(lead), sum(widths)
        matrix = torch.empty(rows, total, total, dtype=torch.float64, device=self.like.device)
        for column in range(total):
            unit = torch.zeros(rows, total, dtype=self.like.dtype, device=self.like.device)
            unit[:, column] = 1
            parts = [part.reshape(s) for part, s in zip(torch.split(unit, widths, 1), self.shapes)]
            matrix[:, column] = torch.cat([f.reshape(rows, -1) for f in self.times(parts)], 1)
        c, vectors = torch.linalg.eigh((matrix + matrix.transpose(1, 2)) / 2)
        floor = 8 * total * torch.finfo(self.like.dtype).eps * c.abs().amax(1, keepdim=True)
        c = torch.where(c.abs() > floor, c, 0.0).to(self.like.dtype)
        pieces = torch.split(vectors.to(self.like.dtype), widths, 1)
        legs: Legs = tuple((edge, _Turned(v, s)) for edge, v, s in zip(self.edges, pieces, self.shapes))
        return Site(name, c, legs)

    def size(self, axes: int) -> tuple[int, int]:
        """(entries of a block, of all blocks)."""
        total = sum(prod(s[axes:]) for s in self.shapes)
        return total, prod(self.shapes[0][:axes]) * total * total


class _Turned(Map):
    """dz = V^T du, block by block."""

    def __init__(self, vectors: Tensor, shape: torch.Size) -> None:
        self.vectors, self.shape = vectors, shape  # [rows, entries of u in a row, entries of a block]

    def push(self, tangents: Tensor) -> Tensor:
        return torch.einsum("kru,ruz->krz", tangents.reshape(len(tangents), *self.vectors.shape[:2]), self.vectors)

    def pull(self, seed: Tensor) -> Tensor:
        return torch.einsum("rz,ruz->ru", seed, self.vectors).reshape(self.shape)
