"""RCT-AF on the CPU in few passes over memory; `python -m benchmarks activations` measures it beside nn.SiLU.

The closed form makes ten temporaries of the size of its input. Here each is as large as a block that stays in the
cache, and one kernel of aten does most of the work. Its softplus_backward(a, x) is a·s(alpha·x) in a single pass, for
alpha of either sign, and its silu_backward(a, t) is a·(s + t·s·(1 - s)); by sigma_{beta+1} = x·sigma_beta':

    sigma_1 = softplus_backward(x, x)             g·sigma_0' = softplus_backward(g, x)
    sigma_2 = x·sigma_1'                          g·sigma_1' = silu_backward(g, alpha·x)
    sigma_0 = max(x, 0) + log(1 + exp(-|t|))/alpha

These serve order 0 and its first backward for beta <= 2 in float32 and the half types, which are computed in float32
block by block and rounded once. The first to write a block of the result is one of the heavy kernels, which hide what
memory costs; a plain sum or product does not. Numbers that meet a tensor are tensors without dimensions, made once a
call: wrapping a float anew takes a fifth of such a pass. Everything else (float64 too) is the closed form by blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad

from hessdiag.activations.formula import TAIL, closed_form, working_dtype

BLOCK = 65_536  # entries a thread works on at a time: 256 KiB of float32, of which two to four live in its cache
LINEAR = 18.0  # s(t) rounds to 1 in float32 beyond it
FUSED = (torch.float32, torch.bfloat16, torch.float16)
FAR = TAIL[torch.float32]
TAME = 1e30  # bound of a block's sum of squares: its entries' powers stay within float32
PLAIN_ALPHA = (1e-6, 1e6)  # alpha² and the powers of t it meets stay within float32

_sigmoid_times = torch.ops.aten.softplus_backward.grad_input  # (a, x, alpha, linear beyond) -> a·s(alpha·x)
_swish_slope_times = torch.ops.aten.silu_backward.grad_input  # (a, t) -> a·(s + t·s·(1 - s))
_bend_times = torch.ops.aten.sigmoid_backward.grad_input  # (a, s) -> a·s·(1 - s)


class Numbers(NamedTuple):
    """Alpha, and the other numbers of the steps as tensors without dimensions."""

    alpha: float
    scale: Tensor  # alpha
    minus: Tensor  # -alpha
    three: Tensor  # 3/alpha
    one: Tensor


Step = Callable[[Tensor, list[Tensor], list[Tensor], Numbers], object]  # (out, given, rows of scratch, numbers)


def ordinary(*tensors: Tensor, device: str) -> bool:
    """True for plain tensors on that kind of device, outside every transform: what is written down of them is all."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or torch._C._get_tracing_state():
        return False
    return all(
        type(t) in (Tensor, nn.Parameter)
        and t.device.type == device
        and t.layout == torch.strided
        and not (t.is_neg() or is_legacy_batchedtensor(t))  # the latter: autograd's is_grads_batched
        for t in tensors
    )


def served(*tensors: Tensor) -> bool:
    """True where the storage of the tensors may be cut into blocks."""
    return ordinary(*tensors, device="cpu")


def value(x: Tensor, alpha: float, beta: int, order: int) -> Tensor:
    """The derivative of the given order at x, in the memory format of x."""
    if order == 0 and _fused(x, alpha, beta):
        if beta == 0:
            return _run(_softplus, alpha, [x], rows=2 if x.dtype == torch.float32 else 4)
        if beta == 2 and x.dtype == torch.float32:
            return _run(_second, alpha, [x], rows=1)
        return product(x, x, alpha, beta - 1, 1)

    def step(out: Tensor, given: list[Tensor], _: list[Tensor], by: Numbers) -> None:
        out.copy_(closed_form(given[0], alpha, beta, order))

    return _run(step, alpha, [x])


def product(g: Tensor, x: Tensor, alpha: float, beta: int, order: int) -> Tensor:
    """The derivative of the given order at x, times g, rounded once, in the memory format of x.

    In float32, that of beta = 1 and order 1 is right to 1e-6 of g, as nn.SiLU's own: 1 - s is rounded where s nears 1.
    """
    if order == 1 and _fused(x, alpha, beta):
        half = x.dtype != torch.float32
        if beta == 0:
            x, out = _dense(x)
            _sigmoid_times(_like(g, x), x, alpha, LINEAR, grad_input=out)
            return out
        if beta == 1:
            return _run(_swish_slope, alpha, [x, g], rows=2 if half else 1)
        return _run(_half_second_slope if half else _second_slope, alpha, [x, g], rows=3 if half else 2)

    def step(out: Tensor, given: list[Tensor], _: list[Tensor], by: Numbers) -> None:
        x, g = given
        out.copy_(closed_form(x.to(working_dtype(x, alpha, 0)), alpha, beta, order).mul_(g))

    return _run(step, alpha, [x, g])


def _fused(x: Tensor, alpha: float, beta: int) -> bool:
    return beta <= 2 and x.dtype in FUSED and PLAIN_ALPHA[0] <= alpha <= PLAIN_ALPHA[1]


def _softplus(out: Tensor, given: list[Tensor], rows: list[Tensor], by: Numbers) -> None:
    """sigma_0 = max(x, 0) + (log w + (e - (w - 1)))/alpha, with e = exp(-|t|) and w = 1 + e as rounded.

    The difference is what rounding took from e: the left tail keeps its digits. aten's log1p takes three times as long
    where e is small, since its inner terms are denormal there.
    """
    (x,) = given
    e, w, *half = rows
    top, wide = half or (out, x)
    torch.abs(_wide(x, wide), out=e).mul_(by.minus).exp_()
    torch.log(torch.add(e, by.one, out=w), out=top)
    e.sub_(w.sub_(by.one)).add_(top)
    if half:
        out.copy_(wide.clamp_min_(0.0).add_(e, alpha=1.0 / by.alpha))
    else:
        torch.clamp_min(x, 0.0, out=out).add_(e, alpha=1.0 / by.alpha)


def _swish_slope(out: Tensor, given: list[Tensor], rows: list[Tensor], by: Numbers) -> None:
    """g·sigma_1' = g·(s + t·s·(1 - s))."""
    (x, g), (t, *half) = given, rows
    _bounded(torch.mul(_wide(x, t), by.scale, out=t), FAR, t)
    if half:
        out.copy_(_swish_slope_times(half[0].copy_(g), t, grad_input=t))
    else:
        _swish_slope_times(g, t, grad_input=out)


def _second(out: Tensor, given: list[Tensor], rows: list[Tensor], by: Numbers) -> None:
    """sigma_2 = max(x, 0) + n·(s + n·s·(1 - s))/alpha at n = -|t|, where 1 - s keeps its digits."""
    (x,), (n,) = given, rows
    _bounded(torch.abs(x, out=n).mul_(by.minus), FAR, n)
    _swish_slope_times(n, n, grad_input=out)
    torch.add(torch.clamp_min(x, 0.0, out=n), out, alpha=1.0 / by.alpha, out=out)


def _second_slope(out: Tensor, given: list[Tensor], rows: list[Tensor], by: Numbers) -> None:
    """g·sigma_2' = g·s·(1 + t·r·(3 + t·(2r - 1))), with r = s(-t): either factor keeps its digits in its tail."""
    (x, g), (near, right) = given, rows
    bounded = _bounded(x, FAR / by.alpha, near)
    _sigmoid_times(bounded, bounded, -by.alpha, LINEAR, grad_input=right)
    torch.sub(by.three, bounded, out=near).add_(right, alpha=2.0).mul_(right)
    _sigmoid_times(g, x, by.alpha, LINEAR, grad_input=out)
    out.addcmul_(out, near, value=by.alpha * by.alpha)


def _half_second_slope(out: Tensor, given: list[Tensor], rows: list[Tensor], by: Numbers) -> None:
    """g·sigma_2' = g·(s + 3·b + b·(t - 2·t·s)), b = t·s·(1 - s): float32 loses 1% of a half's step at the right."""
    (x, g), (t, s, bend) = given, rows
    _bounded(t.copy_(x).mul_(by.scale), FAR, t)
    _bend_times(t, torch.sigmoid(t, out=s), grad_input=bend)
    t.addcmul_(t, s, value=-2.0)
    out.copy_(s.add_(bend, alpha=3.0).addcmul_(bend, t).mul_(bend.copy_(g)))


def _bounded(t: Tensor, far: float, row: Tensor) -> Tensor:
    """The block; where its powers could overflow, or an entry is infinite, a clamp of it in the row.

    s is 0 or 1 beyond `far`. A sum of squares, which shows such entries, costs half of a clamp.
    """
    return t if float(torch.dot(t, t)) < TAME else torch.clamp(t, -far, far, out=row)


def _wide(x: Tensor, row: Tensor) -> Tensor:
    """The block in float32: itself, or a copy in the row."""
    return x if x.dtype == row.dtype else row.copy_(x)


def _run(step: Step, alpha: float, tensors: list[Tensor], *, rows: int = 0) -> Tensor:
    """The step on each block, with so many rows of float32 as scratch; the first tensor gives the memory format."""
    x, out = _dense(tensors[0])
    length = BLOCK * torch.get_num_threads()  # each thread has its own part of every block, and finds it in its cache
    own: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever the defaults are
    scratch = list(torch.empty(rows, min(length, x.numel()), **own).unbind(0)) if rows else []
    by = Numbers(alpha, *(torch.scalar_tensor(n, **own) for n in (alpha, -alpha, 3.0 / alpha, 1.0)))
    flat = [t.as_strided((t.numel(),), (1,)) for t in (out, x, *(_like(t, x) for t in tensors[1:]))]
    blocks = zip(*(torch.split(t, length) for t in flat)) if x.numel() > length else [flat]
    for first, *rest in blocks:
        if scratch and first.numel() < scratch[0].numel():
            scratch = [row[: first.numel()] for row in scratch]
        step(first, rest, scratch, by)
    return out


def _dense(x: Tensor) -> tuple[Tensor, Tensor]:
    """The tensor without gaps and overlaps (itself where it has none), and an empty one of the same strides."""
    out = torch.empty_like(x)
    return (x if _same_strides(x, out) else torch.empty_like(out).copy_(x)), out


def _like(t: Tensor, x: Tensor) -> Tensor:
    """The first tensor in the strides of the second."""
    return t if _same_strides(t, x) else torch.empty_like(x, dtype=t.dtype).copy_(t)


def _same_strides(a: Tensor, b: Tensor) -> bool:
    return all(n == 1 or s == t for n, s, t in zip(a.shape, a.stride(), b.stride()))
