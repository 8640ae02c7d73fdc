"""Recurrent nets as loops over time with the samples first, in their own order.

torch has time first, and its kernels on cards, one for all steps, have no second derivative. Packed sequences hold
samples by their lengths, and of a step only those that are as long: here the padded ones stay beside the packed rows
(`Padded`), steps run on all samples, and a sample that has ended keeps its state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Cell = Callable[[Tensor, Any, Sequence[Tensor | None]], tuple[Tensor, Any]]
"""(what the input gives, state, (w_hh, b_hh, projection)) -> (output, state)."""


def simple(function: Callable[[Tensor], Tensor]) -> Cell:
    """h = f(W x + U h)."""

    def step(given: Tensor, state: Any, weights: Sequence[Tensor | None]) -> tuple[Tensor, Any]:
        w, b, _ = weights
        assert w is not None
        h = function(given + F.linear(state[0], w, b))
        return h, (h,)

    return step


def gru(given: Tensor, state: Any, weights: Sequence[Tensor | None]) -> tuple[Tensor, Any]:
    """torch's GRU."""
    w, b, _ = weights
    assert w is not None
    (r, z, n), (hr, hz, hn) = given.chunk(3, -1), F.linear(state[0], w, b).chunk(3, -1)
    z = torch.sigmoid(z + hz)
    n = torch.tanh(n + torch.sigmoid(r + hr) * hn)
    h = n + z * (state[0] - n)
    return h, (h,)


def lstm(given: Tensor, state: Any, weights: Sequence[Tensor | None]) -> tuple[Tensor, Any]:
    """torch's LSTM, with a projection or without."""
    w, b, projection = weights
    assert w is not None
    i, f, g, o = (given + F.linear(state[0], w, b)).chunk(4, -1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    h = h if projection is None else F.linear(h, projection)
    return h, (h, c)


def whole(torchs: Any, cell: Cell) -> Callable[..., Any]:
    """A net of several steps, layers and directions, as torch calls it."""

    def run(*args: Any) -> Any:
        if not isinstance(args[3], bool):
            return packed(*args)
        x, hidden, flat, biases, layers, dropout, training, both, batch_first = args
        if dropout and training:
            return torchs(*args)
        states = [hidden] if isinstance(hidden, Tensor) else list(hidden)
        weights = _weights(flat, biases, layers, both)
        x, ends = _run(cell, x if batch_first else x.transpose(0, 1), None, states, weights)
        return (x if batch_first else x.transpose(0, 1), *ends)

    def packed(*args: Any) -> Any:
        data, _, hidden, flat, biases, layers, dropout, training, both = args
        kept = _kept(data)
        if kept is None or (dropout and training):
            return torchs(*args)
        order = kept.order
        states = [hidden] if isinstance(hidden, Tensor) else list(hidden)
        if order is not None:
            states = [state.index_select(1, torch.argsort(order)) for state in states]
        x, ends = _run(cell, kept.rows, kept.lengths, states, _weights(flat, biases, layers, both))
        if order is not None:
            ends = [end.index_select(1, order) for end in ends]
        return (_packed(x, kept.lengths, order)[0], *ends)

    return run


def one(cell: Cell) -> Callable[..., Any]:
    """A single step, as torch calls it."""

    def run(x: Tensor, hidden: Any, w_in: Tensor, w: Tensor, b_in: Any = None, b: Any = None) -> Any:
        states = (hidden,) if isinstance(hidden, Tensor) else tuple(hidden)
        _, found = cell(F.linear(x, w_in, b_in), states, (w, b, None))
        return found if len(found) > 1 else found[0]

    return run


Weights = Sequence[Sequence[tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]]]
"""By layers and directions: W and U, their biases, and the projection."""


def _weights(flat: Sequence[Tensor], biases: bool, layers: int, both: bool) -> Weights:
    """torch's list, apart."""
    size = len(flat) // (layers * (1 + both))
    found = []
    for place in range(0, len(flat), size):
        w_in, w, *rest = flat[place : place + size]
        b_in, b = rest[:2] if biases else (None, None)
        projection = rest[2 if biases else 0 :]
        found.append((w_in, w, b_in, b, projection[0] if projection else None))
    return [found[place : place + 1 + both] for place in range(0, len(found), 1 + both)]


def _run(
    cell: Cell, x: Tensor, lengths: Tensor | None, states: Sequence[Tensor], weights: Weights
) -> tuple[Tensor, list[Tensor]]:
    """(outputs [samples, steps, width], last states [layers and directions, samples, width]); zero beyond `lengths`."""
    last: list[Any] = []
    begun = [_handed_out(s) for s in states]
    going = None if lengths is None else _going(lengths, x.shape[1], x.device)
    for layer in weights:
        sides = []
        for side, (w_in, w, b_in, b, projection) in enumerate(layer):
            given = F.linear(x, w_in, b_in).unbind(1)
            state: Any = tuple(s[:, len(last)] for s in begun)
            outputs = []
            for t in reversed(range(len(given))) if side else range(len(given)):
                h, new = cell(given[t], state, (w, b, projection))
                if going is not None and not bool(going[t].all()):
                    here = going[t][:, None]
                    new = tuple(torch.where(here, n, old) for n, old in zip(new, state))
                    h = h.masked_fill(~here, 0.0)
                state = new
                outputs.append(h)
            sides.append(torch.stack(outputs[::-1] if side else outputs, 1))
            last.append(state)
        x = torch.cat(sides, -1) if len(sides) > 1 else sides[0]
    return x, [torch.stack(column) for column in zip(*last)]


def _handed_out(states: Tensor) -> Tensor:
    """[samples, layers and directions, width], by one node: learned ones, the same for all, have samples from it on."""
    rows = states.transpose(0, 1)
    every = torch.arange(len(rows), device=rows.device)
    out: Tensor = torch.ops.aten.index_select(rows, 0, every) if rows.requires_grad else rows
    return out


def _going(lengths: Tensor, steps: int, device: torch.device) -> Tensor:
    """Which samples have not ended, [steps, samples]."""
    return torch.arange(steps, device=device)[:, None] < lengths.to(device)[None]


# -- packed sequences

_KEPT = "_hessdiag_padded"
_PICKED = "_hessdiag_picked"


@dataclass(frozen=True)
class Padded:
    """What packed rows were made of: `rows` [samples, steps, ...] and `lengths` in the samples' own order, and the
    `order` by length in which torch has them (None: the same).
    """

    rows: Tensor
    lengths: Tensor
    order: Tensor | None
    written: tuple[int, ...]
    """How often the packed ones and `rows` had been written to."""


def _written(*tensors: Tensor) -> tuple[int, ...]:
    """How often each was changed in place: what is remembered of it holds until then."""
    return tuple(0 if x.is_inference() else x._version for x in tensors)


def _kept(data: Tensor) -> Padded | None:
    """What packed rows were made of; None where that is not known, or no more so."""
    kept: Padded | None = getattr(data, _KEPT, None)
    return kept if kept is not None and kept.written == _written(data, kept.rows) else None


def index_select(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """torch's, remembering what was put into another order: samples, before they are packed."""
    out: Tensor = torch.ops.aten.index_select(x, dim, index)
    if isinstance(dim, int) and index.ndim == 1 and x.ndim > 1 and len(index) == x.shape[dim]:
        setattr(out, _PICKED, (x, dim, index, _written(out, x, index)))
    return out


def _picked(x: Tensor, axis: int) -> tuple[Tensor, Tensor | None]:
    """(samples in their own order, that in which `x` has them); `x` and None where it was not made so."""
    found: tuple[Tensor, int, Tensor, tuple[int, ...]] | None = getattr(x, _PICKED, None)
    if found is None:
        return x, None
    source, dim, order, written = found
    every = torch.arange(len(order), device=order.device)
    known = dim == axis and written == _written(x, source, order) and torch.equal(order.long().sort().values, every)
    return (source, order) if known else (x, None)


def pack(x: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    """Packed rows, with what they were made of."""
    axis = 0 if batch_first else 1
    source, order = _picked(x, axis)
    rows = source if batch_first else source.transpose(0, 1)
    own = lengths if order is None else torch.empty_like(lengths).scatter_(0, order.to(lengths.device), lengths)
    return _packed(rows[:, : int(lengths.max())], own, order)


def _packed(rows: Tensor, lengths: Tensor, order: Tensor | None) -> tuple[Tensor, Tensor]:
    """(rows of all steps, those of a step in `order`; how many each step has)."""
    going = _going(lengths, rows.shape[1], rows.device)
    in_order = torch.arange(len(rows), device=rows.device) if order is None else order.to(rows.device)
    step, place = going[:, in_order].nonzero(as_tuple=True)
    data = rows[in_order[place], step]
    setattr(data, _KEPT, Padded(rows, lengths, order, _written(data, rows)))
    return data, going.sum(1).cpu()


def unpack(data: Tensor, sizes: Tensor, batch_first: bool, value: float, length: int) -> tuple[Tensor, Tensor]:
    """Padded again, in the order of the packed ones; torch's own where it is not known what they were made of."""
    kept = _kept(data)
    if kept is None:
        return torch._VF._pad_packed_sequence(data, sizes, batch_first, value, length)
    going = _going(kept.lengths, kept.rows.shape[1], data.device).T
    rows = kept.rows.masked_fill(~going.reshape(*going.shape, *(1,) * (kept.rows.ndim - 2)), value)
    if length > rows.shape[1]:
        rows = F.pad(rows, (0, 0) * (rows.ndim - 2) + (0, length - rows.shape[1]), value=value)
    lengths = kept.lengths
    if kept.order is not None:
        rows, lengths = rows.index_select(0, kept.order), lengths[kept.order.to(lengths.device)]
    return (rows if batch_first else rows.transpose(0, 1)), lengths
