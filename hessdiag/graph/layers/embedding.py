"""Rows of a table looked up by whole numbers: a_t = W[i_t] for every place t of a sample.

G_n[v] = sum of delta_nt over the places where i_nt = v. Few rows of the table are looked up by one sample: gradients
are summed over equal numbers of a sample [distinct rows, width], squared, and only then added into the table, so that
no sample ever holds a table of its own. Exact second derivatives move one direction per distinct number of a sample
and column, each sample along a row of its own, since samples do not meet.

The row `padding_idx` has no gradient in torch: it is a constant, and its entries are zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hessdiag.graph import saved
from hessdiag.graph.chunks import chunk_samples, grouped
from hessdiag.graph.kinds import Given
from hessdiag.graph.layers.layer import Along, Into, Layer, LayerKind, Parts, Way
from hessdiag.graph.nodes import edge_shape, sizes
from hessdiag.graph.tangents import Tangent

if TYPE_CHECKING:
    from hessdiag.graph.reading import Graph


class Embedding(LayerKind):
    """A table that is a parameter, looked up by constants."""

    name = "embedding"
    nodes = frozenset({"EmbeddingBackward0"})
    always_audited = False

    @classmethod
    def match(cls, node: Any, graph: Graph) -> Layer | None:
        """The table must be the parameter itself; gradients that torch scales or thins are no derivatives."""
        weight = graph.direct(node, 0)
        if weight and saved.flag(node, "scale_grad_by_freq"):
            graph.refuse(
                node, f"gradients of {weight!r} scaled by frequency (scale_grad_by_freq=True) are no gradients"
            )
        return Layer(cls, graph.layer_name(weight), node, weight, None) if weight else None

    @classmethod
    def given(cls, node: Any) -> None:
        """Numbers have no gradient: the table stands first."""
        return

    @classmethod
    def enters(cls, node: Any, graph: Graph) -> bool:
        """Numbers of samples are a matrix as a rule; a row of them may be places."""
        return saved.tensor(node, "indices").ndim > 1

    @classmethod
    def constant(cls, node: Any) -> Tensor:
        """The numbers."""
        return saved.tensor(node, "indices")

    @classmethod
    def move(cls, node: Any, shape: torch.Size, given: Sequence[Given]) -> Tangent | None:
        """The rows of the table's tangent; not the one that padding keeps."""
        numbers, padding = saved.tensor(node, "indices"), saved.integer(node, "padding_idx", -1)
        rows = given[0][2].dense(edge_shape(given[0][1]))[:, numbers.reshape(-1)].reshape(-1, *shape)
        return Tangent(rows * (numbers != padding)[..., None] if padding >= 0 else rows)

    def read(self) -> None:
        """Numbers of the rows [samples, places], those of padding -1, and how many rows there are."""
        node = self.layer.node
        numbers = saved.tensor(node, "indices").reshape(self.samples, -1)
        padding = saved.integer(node, "padding_idx", -1)
        self._numbers = torch.where(numbers == padding, -1, numbers) if padding >= 0 else numbers
        self._width = self.out[-1]
        self._rows = saved.integer(node, "weight_sym_argsize_0")

    @property
    def _name(self) -> str:
        assert self.layer.weight is not None
        return self.layer.weight

    # -- gradients of single samples

    def each(self, delta: Tensor) -> dict[str, Tensor]:
        """G_n as whole tables."""
        return {self._name: self._tables(delta, 0, self.samples)}

    def per_group(self, delta: Tensor, group: int, *, squares: bool) -> Parts:
        """Tables of groups of samples, in chunks; or, with `squares`, the sum of their squares without a table each."""
        if not squares:
            yield self._name, self._chunks(delta, group)
            return
        seen, where = self._distinct(group)
        sums = self._per_distinct(delta, where, len(seen))
        out = delta.new_zeros(self._rows + 1, self._width)
        yield self._name, out.index_add_(0, seen % (self._rows + 1), sums.square_())[:-1]

    def units(self) -> Tensor:
        """Columns of the table."""
        return torch.arange(self._width, device=sizes(self.layer.node).device)

    def weighted(self, c: Tensor) -> dict[str, Tensor]:
        """sum of c over the places of a number."""
        out = c.new_zeros(self._rows + 1, self._width)
        out.index_add_(0, self._or_last(self._numbers).reshape(-1), c.reshape(-1, self._width))
        return {self._name: out[:-1]}

    def gram(self, delta: Tensor) -> Tensor:
        """Each place gets the sum over the places of its number."""
        seen, where = self._distinct(1)
        sums = self._per_distinct(delta, where, len(seen))
        sums[seen % (self._rows + 1) == self._rows] = 0
        return sums[where].reshape(delta.shape)

    def onto(self, v: Tensor) -> Tensor:
        """The mean over the places of a number."""
        seen, where = self._distinct(1)
        means = self._per_distinct(v, where, len(seen)) / torch.bincount(where, minlength=len(seen))[:, None]
        means[seen % (self._rows + 1) == self._rows] = 0
        return means[where].reshape(v.shape)

    def stretch(self) -> Tensor:
        """The root of how many places of its sample look up the same row: at each of them it moves by 1."""
        seen, where = self._distinct(1)
        times = torch.bincount(where, minlength=len(seen))[where]
        return times.to(sizes(self.layer.node).dtype).sqrt().reshape(*self.out[:-1], 1)

    def drawn(self, signs: Tensor) -> Tensor:
        """Those of one place for all that look up the same row, over the root of their number."""
        seen, where = self._distinct(1)
        places = torch.arange(len(where), device=where.device)
        first = places.new_full((len(seen),), len(where)).scatter_reduce_(0, where, places, "amin")
        rows = signs.reshape(-1, self._width)[first]
        rows[seen % (self._rows + 1) == self._rows] = 0
        return rows[where].reshape(signs.shape) / self.stretch()

    def looked_up(self) -> Tensor:
        """The numbers of all places."""
        return self._numbers

    def _tables(self, delta: Tensor, low: int, high: int) -> Tensor:
        numbers = self._or_last(self._numbers[low:high])
        first = torch.arange(high - low, device=numbers.device)[:, None] * (self._rows + 1)
        d = delta.reshape(self.samples, -1, self._width)[low:high]
        flat = d.new_zeros((high - low) * (self._rows + 1), self._width)
        flat = flat.index_add(0, (numbers + first).reshape(-1), d.reshape(-1, self._width))
        return flat.reshape(high - low, self._rows + 1, self._width)[:, :-1]

    def _chunks(self, delta: Tensor, group: int) -> Iterator[Tensor]:
        step = chunk_samples((self._rows + 1) * self._width * delta.element_size(), group, delta.device)
        for low in range(0, self.samples, step):
            yield grouped(self._tables(delta, low, min(low + step, self.samples)), group)

    def _or_last(self, numbers: Tensor) -> Tensor:
        """Padding as one row more."""
        return torch.where(numbers < 0, self._rows, numbers)

    def _distinct(self, group: int) -> tuple[Tensor, Tensor]:
        """(group * rows + number of every distinct number of a group of samples, which of them each place is)."""
        of = torch.arange(self.samples, device=self._numbers.device)[:, None] // group
        keys = self._or_last(self._numbers) + of * (self._rows + 1)
        seen, where = torch.unique(keys.reshape(-1), return_inverse=True)
        return seen, where

    def _per_distinct(self, delta: Tensor, where: Tensor, count: int) -> Tensor:
        return delta.new_zeros(count, self._width).index_add_(0, where, delta.reshape(-1, self._width))

    # -- parameters that are applied more than once

    def some(self, delta: Tensor, low: int, high: int) -> dict[str, Tensor]:
        """Tables of some samples."""
        return {self._name: self._tables(delta, low, high)}

    # -- second derivatives along single parameters

    def ways(self, parameters: Mapping[str, Tensor]) -> list[Way]:
        """One direction per distinct number of a sample and column."""
        numbers, order = self._numbers.sort(1)
        fresh = numbers.diff(dim=1, prepend=numbers[:, :1] - 1) != 0
        rank = torch.zeros_like(order).scatter_(1, order, fresh.cumsum(1) - 1)  # which distinct number of its sample
        most = int(rank.max()) + 1 if rank.numel() else 0

        def run(along: Along, into: Into, count: int) -> None:
            width, meta = self._width, sizes(self.layer.node)
            columns = torch.arange(most * width, device=rank.device)
            for part in torch.split(columns, count):
                slot, column = part // width, part % width
                here = (rank[None] == slot[:, None, None]) & (self._numbers >= 0)[None]  # [K, samples, places]
                seed = torch.zeros(*here.shape, width, dtype=meta.dtype, device=rank.device)
                seed[torch.arange(len(part), device=rank.device), :, :, column] = here.to(meta.dtype)
                found = along.total(Tangent(seed.reshape(-1, *self.out)))
                row = torch.where(here, self._numbers[None], 0).amax(2)
                into.scatter(self._name, row * width + column[:, None], found)

        return [Way(most * self._width, run)]

    def directions(self, parameters: Mapping[str, Tensor], count: int) -> Iterator[tuple[str, slice, Tangent]]:
        """One entry of the table at every place that looks it up."""
        width, meta = self._width, sizes(self.layer.node)
        for low in range(0, self._rows * width, count):
            flat = torch.arange(low, min(low + count, self._rows * width), device=self._numbers.device)
            here = self._numbers[None] == (flat // width)[:, None, None]
            seed = torch.zeros(*here.shape, width, dtype=meta.dtype, device=here.device)
            seed[torch.arange(len(flat), device=here.device), :, :, flat % width] = here.to(meta.dtype)
            yield self._name, slice(low, low + len(flat)), Tangent(seed.reshape(-1, *self.out))
