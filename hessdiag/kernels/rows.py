"""A table that is looked up and is the head besides: what a pass of signs holds beyond the head's own, closed share.

Rows of a table W are looked up, and f_t = W h_t are the outputs, h_t depending on W by the rows looked up alone. A row
v that a sample does not look up meets its loss in the outputs f_tv only: no site depends on it, and its second
derivative is the head's own share, sum_t (d2l/df_tv^2) h_t^2, which is closed. What a pass holds of such a row besides,
products of independent signs that are zero on average, is noise. So of every sample the rows are taken that it looks
up, at most as many as it has places, and no sample ever holds a table of its own.

With G = A + X, A the head's own gradient of one sample and X all else, that of the look-ups and of the head's bilinear
term, what is left is G^2 - A^2 = X (2 A + X).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hessdiag.graph import LayerKind, Linearisation
from hessdiag.graph.chunks import chunk_samples
from hessdiag.graph.layers.layer import Half

Factors = tuple[Tensor, Tensor]


class Rows:
    """One table of one linearised batch: its head and its look-ups, by their places in `shared`."""

    def __init__(self, head: LayerKind, look_ups: Mapping[int, LayerKind]) -> None:
        given = head.given_rows()
        assert given is not None
        self._head, self._given = head, given
        looked_up = {place: numbers for place, one in look_ups.items() if (numbers := one.looked_up()) is not None}
        numbers = torch.cat(list(looked_up.values()), 1)
        ordered, order = numbers.sort(1)
        fresh = ordered.diff(dim=1, prepend=ordered[:, :1] - 1) != 0
        which = torch.zeros_like(order).scatter_(1, order, fresh.cumsum(1) - 1)
        most = int(which.max()) + 1 if which.numel() else 0
        self._rows = numbers.new_full((len(numbers), most), -1).scatter_(1, which, numbers)
        """Of each sample the distinct rows that it looks up; -1 for padding, and where there are no more."""
        self._which = dict(zip(looked_up, torch.split(which, [one.shape[1] for one in looked_up.values()], 1)))
        """By look-up, at every place which of these it is."""

    @classmethod
    def found(cls, batch: Linearisation) -> dict[int, Rows]:
        """By the place of their head, the tables of a batch that have one head and that all others look up."""
        first, known, found = len(batch.layers), batch.graph.applied, dict[int, Rows]()
        for place, layer in enumerate(batch.shared):
            name = layer.weight
            if first + place not in batch.heads or name is None or layer.own != (name,) or known[name].computed:
                continue
            others = {
                other: one.on(batch.samples)
                for other, one in enumerate(batch.shared)
                if other != place and any(name in known[key].names for key in one.own)
            }
            head = layer.on(batch.samples)
            apart = all(one.layer.own == (name,) and one.looked_up() is not None for one in others.values())
            if others and apart and layer.kind.factored() and head.given_rows() is not None:
                found[place] = cls(head, others)
        return found

    @property
    def name(self) -> str:
        """That of the table."""
        assert self._head.layer.weight is not None
        return self._head.layer.weight

    def of_head(self, delta: Tensor) -> Factors:
        """What is needed of the head's cotangent: its columns of these rows, and what the head is given."""
        return self._chosen(*self._head.factors(delta))

    def of_half(self, half: Half, seed: Tensor) -> Factors:
        """The same of seeds of the head's bilinear term."""
        return self._chosen(*half.factors(seed))

    def beyond(self, head: Factors | None, halves: Sequence[Factors], deltas: Mapping[int, Tensor]) -> Tensor:
        """Sum over samples of G^2 - A^2; `deltas` are the cotangents of look-ups, by their place."""
        samples, most = self._rows.shape
        looked_up = {place: delta for place, delta in deltas.items() if place in self._which}
        rows, width = self._head.out[-1], self._given.shape[-1]
        out = self._given.new_zeros(rows + 1, width)
        step = chunk_samples(3 * most * width * out.element_size(), 1, out.device)
        for low in range(0, samples, step):
            high = min(low + step, samples)
            x = out.new_zeros((high - low) * most, width)
            first = most * torch.arange(high - low, device=x.device)[:, None]
            for place, delta in looked_up.items():
                d = delta.reshape(samples, -1, width)[low:high]
                x.index_add_(0, (self._which[place][low:high] + first).flatten(), d.flatten(0, 1))
            x = x.reshape(-1, most, width)
            for left, right in halves:
                x += left[low:high] @ right[low:high].transpose(1, 2)
            both = x if head is None else x + 2.0 * (head[0][low:high] @ head[1][low:high].transpose(1, 2))
            where = self._rows[low:high].flatten()
            out.index_add_(0, torch.where(where < 0, rows, where), (x * both).flatten(0, 1))
        return out[:-1]

    def _chosen(self, left: Tensor, right: Tensor) -> Factors:
        """Factors [samples, rows of the table, s] and [samples, width, s], of the first the rows that are looked up."""
        index = self._rows.clamp(min=0)[:, :, None].expand(-1, -1, left.shape[2])
        return left.gather(1, index), right
