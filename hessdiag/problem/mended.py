"""The same functions by operations that have a first and a second derivative, right in float64, sample by sample.

hardsigmoid has no second derivative and keeps 1/6 in float32; CELU keeps 1/alpha in float32 (both of torch 2.13, 3e-8
off in float64); bags of embeddings have no second derivative; that of weight_norm is not symmetric on CPUs. Recurrent
nets run as loops over time with the samples first: torch has time first, and its kernels on cards, one for all steps,
have no second derivative. Attention of several heads keeps the samples first, too (`attention`). addcmul is a product
and a sum, in which parameters are gains and biases. What changes gradients alone is no part of the loss: hooks, an
embedding's `scale_grad_by_freq` and `sparse`.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from hessdiag.errors import UncoveredModelError
from hessdiag.problem.attention import multi_head


def _celu(x: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    function = torch.ops.aten.elu_ if inplace else torch.ops.aten.elu
    out: Tensor = function(x, alpha, 1.0, 1.0 / alpha)
    return out


def _celu_(x: Tensor, alpha: float = 1.0) -> Tensor:
    return _celu(x, alpha, True)


def _hardsigmoid(x: Tensor, inplace: bool = False) -> Tensor:
    return F.relu6(x.add_(3.0), inplace=True).div_(6.0) if inplace else F.relu6(x + 3.0) / 6.0


def _hardsigmoid_(x: Tensor) -> Tensor:
    return _hardsigmoid(x, True)


def _addcmul(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1, **kwargs: Any) -> Tensor:
    if kwargs:  # out=
        return torch.ops.aten.addcmul(input, tensor1, tensor2, value=value, **kwargs)  # type: ignore[no-any-return]
    product = tensor1 * tensor2
    return input + (product if value == 1 else value * product)


MAX_NORM = (
    "an embedding with max_norm shortens rows of its table when they are looked up; some of these stand at the bound, "
    "where the loss has a kink that no gradient shows; shorten them once and set max_norm=None, or freeze the table"
)


def _below(weight: Tensor, numbers: Tensor, bound: float | None, order: float) -> None:
    """Refuse a table that is changed by being looked at."""
    if bound is not None:
        with torch.no_grad():
            norms = torch.linalg.vector_norm(weight[torch.unique(numbers)], order, 1)
            if bool((norms >= bound * (1 - 1e-6)).any()):
                raise UncoveredModelError(MAX_NORM)


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    _below(weight, input, max_norm, norm_type)
    return F.embedding(input, weight, padding_idx)


_BAG = inspect.signature(F.embedding_bag)


def _embedding_bag(*args: Any, **named: Any) -> Tensor:
    """Bags as rows of one length, what is missing or padding weighted by zero."""
    bound = _BAG.bind(*args, **named)
    bound.apply_defaults()
    given = bound.arguments
    input, weight, offsets, mode = (given[name] for name in ("input", "weight", "offsets", "mode"))
    factors, padding = given["per_sample_weights"], given["padding_idx"]
    _below(weight, input, given["max_norm"], given["norm_type"])
    if input.ndim == 1:
        if offsets is None:
            raise ValueError("offsets has to be a 1D Tensor but got None")
        last = given["include_last_offset"]
        ends = offsets[1:] if last else torch.cat([offsets[1:], offsets.new_tensor([len(input)])])
        starts = offsets[:-1] if last else offsets
        places = torch.arange(max(int((ends - starts).max()), 1), device=input.device)
        there = starts[:, None] + places < ends[:, None]
        where = torch.where(there, starts[:, None] + places, 0)
        numbers = input[where]
        factors = None if factors is None else factors[where]
    else:
        numbers, there = input, torch.ones_like(input, dtype=torch.bool)
    if padding is not None:
        there = there & (numbers != padding % len(weight))
    rows = F.embedding(torch.where(there, numbers, 0), weight)
    if mode == "max":
        picked = rows.masked_fill(~there[:, :, None], -torch.inf).max(1).values
        return picked.masked_fill(~there.any(1, keepdim=True), 0.0)
    kept = there.to(rows.dtype)
    if mode == "mean":
        kept = kept / kept.sum(1, keepdim=True).clamp(min=1.0)
    rows = rows * kept[:, :, None]
    summed: Tensor = (rows if factors is None else rows * factors[:, :, None]).sum(1)
    return summed


def _no_hook(*_: Any) -> RemovableHandle:
    return RemovableHandle(OrderedDict())


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """g v / |v|, the length over all axes but one (-1: over all)."""
    axes = [axis for axis in range(v.ndim) if dim == -1 or axis != dim % v.ndim]
    return v * (g * v.square().sum(axes, keepdim=dim != -1).rsqrt())


Cell = Callable[[Tensor, Any, Sequence[Tensor | None]], tuple[Tensor, Any]]
"""(what the input gives, state, (w_hh, b_hh, projection)) -> (output, state)."""


def _simple(function: Callable[[Tensor], Tensor]) -> Cell:
    def step(given: Tensor, state: Any, weights: Sequence[Tensor | None]) -> tuple[Tensor, Any]:
        w, b, _ = weights
        assert w is not None
        h = function(given + F.linear(state[0], w, b))
        return h, (h,)

    return step


def _gru(given: Tensor, state: Any, weights: Sequence[Tensor | None]) -> tuple[Tensor, Any]:
    w, b, _ = weights
    assert w is not None
    (r, z, n), (hr, hz, hn) = given.chunk(3, -1), F.linear(state[0], w, b).chunk(3, -1)
    z = torch.sigmoid(z + hz)
    n = torch.tanh(n + torch.sigmoid(r + hr) * hn)
    h = n + z * (state[0] - n)
    return h, (h,)


def _lstm(given: Tensor, state: Any, weights: Sequence[Tensor | None]) -> tuple[Tensor, Any]:
    w, b, projection = weights
    assert w is not None
    i, f, g, o = (given + F.linear(state[0], w, b)).chunk(4, -1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    h = h if projection is None else F.linear(h, projection)
    return h, (h, c)


def _recurrent(whole: Any, cell: Cell) -> Callable[..., Any]:
    """A net of several steps, layers and directions, as torch calls it."""

    def run(*args: Any) -> Any:
        if not isinstance(args[3], bool) or (args[5] and args[6]):
            return whole(*args)  # packed sequences, whose rows are not the samples; or dropout
        x, hidden, flat, biases, layers, _, _, both, batch_first = args
        states = [hidden] if isinstance(hidden, Tensor) else list(hidden)
        x = x if batch_first else x.transpose(0, 1)
        size = len(flat) // (layers * (1 + both))
        last: list[Any] = []
        for layer in range(layers):
            sides = []
            for side in range(1 + both):
                place = layer * (1 + both) + side
                own = list(flat[place * size : (place + 1) * size])
                w_in, w = own[:2]
                b_in, b = own[2:4] if biases else (None, None)
                rest = own[4 if biases else 2 :]
                given = F.linear(x, w_in, b_in).unbind(1)
                state: Any = tuple(s[place] for s in states)
                outputs = []
                for step in reversed(given) if side else given:
                    h, state = cell(step, state, (w, b, rest[0] if rest else None))
                    outputs.append(h)
                sides.append(torch.stack(outputs[::-1] if side else outputs, 1))
                last.append(state)
            x = torch.cat(sides, -1) if both else sides[0]
        ends = [torch.stack(column) for column in zip(*last)]
        return (x if batch_first else x.transpose(0, 1), *ends)

    return run


def _one(cell: Cell) -> Callable[..., Any]:
    """A single step, as torch calls it."""

    def run(x: Tensor, hidden: Any, w_in: Tensor, w: Tensor, b_in: Any = None, b: Any = None) -> Any:
        states = (hidden,) if isinstance(hidden, Tensor) else tuple(hidden)
        _, found = cell(F.linear(x, w_in, b_in), states, (w, b, None))
        return found if len(found) > 1 else found[0]

    return run


MENDED: dict[Any, Callable[..., Any]] = {
    F.multi_head_attention_forward: multi_head,
    F.embedding: _embedding,
    F.embedding_bag: _embedding_bag,
    F.celu: _celu,
    torch.celu: _celu,
    torch.celu_: _celu_,
    F.hardsigmoid: _hardsigmoid,
    torch._C._nn.hardsigmoid: _hardsigmoid,
    torch._C._nn.hardsigmoid_: _hardsigmoid_,
    torch.addcmul: _addcmul,
    Tensor.addcmul: _addcmul,
    Tensor.register_hook: _no_hook,
    torch._weight_norm: _weight_norm,
    torch.rnn_tanh: _recurrent(torch.rnn_tanh, _simple(torch.tanh)),
    torch.rnn_relu: _recurrent(torch.rnn_relu, _simple(torch.relu)),
    torch.gru: _recurrent(torch.gru, _gru),
    torch.lstm: _recurrent(torch.lstm, _lstm),
    torch.rnn_tanh_cell: _one(_simple(torch.tanh)),
    torch.rnn_relu_cell: _one(_simple(torch.relu)),
    torch.gru_cell: _one(_gru),
    torch.lstm_cell: _one(_lstm),
}
