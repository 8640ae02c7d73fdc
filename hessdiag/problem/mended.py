"""The same functions by operations that have a first and a second derivative, right in float64, sample by sample.

hardsigmoid has no second derivative and keeps 1/6 in float32; CELU keeps 1/alpha in float32 (both of torch 2.13, 3e-8
off in float64); bags of embeddings have no second derivative; that of weight_norm is not symmetric on CPUs, and that of
group_norm ends the process for a gain or bias alone where the channels are last in memory. On cards rms_norm is one
kernel. Recurrent nets run as loops over time with the samples first: torch has time first, and its kernels on cards,
one for all steps, have no second derivative. Attention of several heads keeps the samples first, too (`attention`).
addcmul is a product and a sum, in which parameters are gains and biases. What changes gradients alone is no part of the
loss: hooks, an embedding's `scale_grad_by_freq` and `sparse`.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from hessdiag.errors import UncoveredModelError
from hessdiag.problem import contraction, recurrent
from hessdiag.problem.attention import multi_head
from hessdiag.problem.spectra import by_parts, divided, entry_by_entry


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
    return _rows(input, weight, padding_idx)


def _rows(numbers: Tensor, weight: Tensor, padding: int | None = None) -> Tensor:
    """Rows of a table; where nothing is looked up torch has no second derivative."""
    if numbers.numel():
        return F.embedding(numbers, weight, padding)
    return weight[:0].reshape(*numbers.shape, weight.shape[1])


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
        if not len(input):  # no bag holds anything
            input, factors = input.new_zeros(1), None
        most = int((ends - starts).max()) if len(starts) else 1
        places = torch.arange(max(most, 1), device=input.device)
        there = starts[:, None] + places < ends[:, None]
        where = torch.where(there, starts[:, None] + places, 0)
        numbers = input[where]
        factors = None if factors is None else factors[where]
    else:
        numbers, there = input, torch.ones_like(input, dtype=torch.bool)
    if padding is not None:
        there = there & (numbers != padding % len(weight))
    rows = _rows(torch.where(there, numbers, 0), weight)
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


_ALIKE = (
    "div", "divide", "true_divide", "pow", "float_power", "maximum", "minimum", "fmax", "fmin", "clamp", "clamp_min",
    "clamp_max", "clip", "atan2", "arctan2", "hypot", "xlogy", "logaddexp", "logaddexp2", "lerp", "addcdiv",
)  # fmt: skip
"""Functions of single entries in which a parameter may stand beside samples, products and sums apart."""
_METHODS = (*(f"{name}_" for name in _ALIKE), *(f"__{name}__" for name in ("truediv", "rtruediv", "itruediv", "div")),
            *(f"__{name}__" for name in ("pow", "rpow", "ipow")))  # fmt: skip


def _spread(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same with what has no samples handed to each of them, where torch would broadcast it: one node then hands
    out a parameter, and the function is one of two tensors, sample by sample.
    """

    def run(*args: Any, **kwargs: Any) -> Tensor:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if not any(x.requires_grad for x in tensors) or len(tensors) < 2:
            return function(*args, **kwargs)
        shape: torch.Size = torch.broadcast_shapes(*(x.shape for x in tensors))  # type: ignore[no-untyped-call]

        def full(x: Any) -> Any:
            if not (isinstance(x, Tensor) and x.requires_grad and shape):
                return x
            alone = x.ndim == len(shape) and x.shape[0] == 1 and (shape[0] != 1 or x.is_leaf)
            return x.expand(shape) if x.ndim < len(shape) or alone else x

        return function(*map(full, args), **{name: full(x) for name, x in kwargs.items()})

    return run


def _spreading() -> dict[Any, Callable[..., Any]]:
    """By every name under which torch has these functions."""
    found: dict[Any, Callable[..., Any]] = {}
    for owner, names in ((torch, _ALIKE), (Tensor, (*_ALIKE, *_METHODS))):
        for name in names:
            if hasattr(owner, name):
                found[getattr(owner, name)] = _spread(getattr(owner, name))
    return found


def _real(plain: Callable[..., Tensor], function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Of complex numbers, by their real and imaginary parts."""

    def run(x: Tensor, *args: Any, **named: Any) -> Tensor:
        return function(x.real, x.imag) if x.is_complex() and not (args or named) else plain(x, *args, **named)

    return run


def _polar(abs: Tensor, angle: Tensor) -> Tensor:
    return torch.complex(abs * torch.cos(angle), abs * torch.sin(angle))


_INSTANCE, _BATCH = inspect.signature(F.instance_norm), inspect.signature(F.batch_norm)


def _instance_norm(*args: Any, **named: Any) -> Tensor:
    """Pixels as the features of a layer norm, or running statistics taken off them, then gain and bias channel by
    channel: torch repeats these for every sample, and its gradient of one sample is wrong where what comes down to it
    has the channels last in memory.
    """
    bound = _INSTANCE.bind(*args, **named)
    bound.apply_defaults()
    given = bound.arguments
    if not given["use_input_stats"] and given["running_mean"] is None:
        return F.instance_norm(*args, **named)  # which refuses it
    x, weight, bias = given["input"], given["weight"], given["bias"]
    shape = (-1, *(1,) * (x.ndim - 2))
    if given["use_input_stats"]:  # running statistics, if any, are no part of what it gives
        plain = F.layer_norm(x, x.shape[2:], eps=given["eps"])
    else:
        mean, variance = given["running_mean"].reshape(shape), given["running_var"].reshape(shape)
        plain = (x - mean) * (variance + given["eps"]).rsqrt()
    plain = plain if weight is None else plain * weight.reshape(shape)
    return plain if bias is None else plain + bias.reshape(shape)


def _group_norm(input: Tensor, *args: Any, **named: Any) -> Tensor:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(input.ndim)
    if last is None or not input.is_contiguous(memory_format=last):  # one pixel alone is both
        return F.group_norm(input, *args, **named)
    return F.group_norm(input.flatten(2), *args, **named).reshape(input.shape)


def _rms_norm(
    input: Tensor, normalized_shape: list[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """By operations on every device, as torch has it on CPUs; on cards it is one node that hides what bends in it."""
    if input.dtype not in (torch.float32, torch.float64):
        return F.rms_norm(input, normalized_shape, weight, eps)
    axes = list(range(-len(normalized_shape), 0))
    small = torch.finfo(input.dtype).eps if eps is None else eps
    plain = input * input.pow(2).mean(axes, keepdim=True).add(small).rsqrt()
    return plain if weight is None else plain * weight


def _batch_norm(*args: Any, **named: Any) -> Tensor:
    """Of one sample without running statistics (as weights are standardised) as an instance normalisation."""
    bound = _BATCH.bind(*args, **named)
    bound.apply_defaults()
    given = bound.arguments
    if given.pop("training") and given["running_mean"] is None and len(given["input"]) == 1:
        return _instance_norm(**given)
    return F.batch_norm(*args, **named)


def _by_name(turned: Callable[[Any], Callable[..., Any]], *names: str) -> dict[Any, Callable[..., Any]]:
    """torch's functions and methods of these names, each turned into another."""
    owners = (torch, Tensor)
    known = [getattr(owner, name) for owner in owners for name in names if hasattr(owner, name)]
    return {function: turned(function) for function in known}


WIDE = 256
"""Entries beyond which a variance is that of its parts: as one node they would bend together, in one large block."""


def _given(x: Tensor, dim: Any, args: tuple[Any, ...], keepdim: bool, named: dict[str, Any]) -> tuple[Any, ...]:
    """Axes, keepdim and what else there is, of a moment in the newer or the older form."""
    if isinstance(dim, bool):  # the older form: unbiased
        named, dim = {"unbiased": dim} | named, None
    if args:
        named, keepdim = {"unbiased": args[0]} | named, args[1] if len(args) > 1 else keepdim
    axes = tuple(range(x.ndim)) if dim is None else tuple(dim) if isinstance(dim, (tuple, list)) else (dim,)
    return axes, keepdim, named


def _moment(plain: Callable[..., Tensor], *, root: bool) -> Callable[..., Tensor]:
    """A variance, or the root of one."""

    def run(x: Tensor, *args: Any, **named: Any) -> Tensor:
        known = named.keys() <= {"dim", "unbiased", "correction", "keepdim"}  # not numpy's names, or out=
        if not known or not x.requires_grad or x.is_complex():
            return plain(x, *args, **named)
        dim, rest = (args[0], args[1:]) if args else (named.get("dim"), ())
        others = {name: value for name, value in named.items() if name in ("unbiased", "correction")}
        axes, keepdim, how = _given(x, dim, rest, named.get("keepdim", False), others)
        count = prod(x.shape[axis] for axis in axes)
        if count <= WIDE:
            return plain(x, *args, **named)
        correction = how.get("correction", 1 if how.get("unbiased", True) else 0)
        square = (x - x.mean(axes, keepdim=True)).square().sum(axes, keepdim=keepdim)
        variance: Tensor = square / (count - (1 if correction is None else correction))
        if not root:
            return variance
        alike = variance == 0  # torch takes the slope there for zero
        return variance.masked_fill(alike, 1.0).sqrt().masked_fill(alike, 0.0)

    return run


def _pair(first: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """A moment and the mean, each by a function of its own."""

    def run(x: Tensor, dim: Any = None, *args: Any, keepdim: bool = False, **named: Any) -> tuple[Tensor, Tensor]:
        axes, keepdim, named = _given(x, dim, args, keepdim, named)
        return first(x, axes, keepdim=keepdim, **named), x.mean(axes, keepdim=keepdim)

    return run


MENDED: dict[Any, Callable[..., Any]] = {
    **_spreading(),
    **_by_name(entry_by_entry, "mul", "multiply", "__mul__"),
    **_by_name(by_parts, "mm", "bmm"),
    **_by_name(lambda function: divided(_spread(function)), "div", "divide", "true_divide", "__truediv__", "__div__"),
    **_by_name(contraction.matmul, "matmul", "__matmul__", "mv"),
    F.linear: contraction.linear,
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
    torch.rnn_tanh: recurrent.whole(torch.rnn_tanh, recurrent.simple(torch.tanh)),
    torch.rnn_relu: recurrent.whole(torch.rnn_relu, recurrent.simple(torch.relu)),
    torch.gru: recurrent.whole(torch.gru, recurrent.gru),
    torch.lstm: recurrent.whole(torch.lstm, recurrent.lstm),
    torch.rnn_tanh_cell: recurrent.one(recurrent.simple(torch.tanh)),
    torch.rnn_relu_cell: recurrent.one(recurrent.simple(torch.relu)),
    torch.gru_cell: recurrent.one(recurrent.gru),
    torch.lstm_cell: recurrent.one(recurrent.lstm),
    torch._VF._pack_padded_sequence: recurrent.pack,
    torch._VF._pad_packed_sequence: recurrent.unpack,
    torch.index_select: recurrent.index_select,
    Tensor.index_select: recurrent.index_select,
    torch.einsum: contraction.einsum,
    torch.cdist: contraction.cdist,
    F.bilinear: contraction.bilinear,
    torch.bilinear: contraction.bilinear,
    F.group_norm: _group_norm,
    torch.group_norm: _group_norm,
    F.instance_norm: _instance_norm,
    F.batch_norm: _batch_norm,
    F.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    **{name: _real(name, torch.hypot) for name in (torch.abs, torch.absolute, Tensor.abs, Tensor.absolute)},
    **{name: _real(name, lambda re, im: torch.atan2(im, re)) for name in (torch.angle, Tensor.angle)},
    Tensor.__abs__: _real(Tensor.__abs__, torch.hypot),
    torch.polar: _polar,
    **_by_name(lambda function: _moment(function, root=False), "var"),
    **_by_name(lambda function: _moment(function, root=True), "std"),
    torch.var_mean: _pair(_moment(torch.var, root=False)),
    torch.std_mean: _pair(_moment(torch.std, root=True)),
}
