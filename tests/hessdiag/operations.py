"""Torch's differentiable operations, each as a function of one hidden tensor [samples, ...] that depends on parameters.

`OPERATIONS` names them as torch does; where two names are one operation the table has it once. An entry is the
operation itself, or (shape of the hidden tensor without its first axis, operation). Arguments keep the operation inside
its domain and away from its kinks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Operation = Callable[[Tensor], Tensor]
WIDTH = (6,)
SQUARE = (3, 3)
IMAGE = (2, 4, 4)


def fixed(*shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:
    """A constant of all different entries."""
    count = max(int(torch.Size(shape).numel()), 1)
    ramp = torch.arange(count, dtype=torch.float64) * 0.618033988749895 % 1.0
    return (low + (high - low) * ramp).reshape(shape)


def like(h: Tensor, *shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:
    """The same in the dtype of `h`, by default of its shape."""
    return fixed(*(shape or tuple(h.shape)), low=low, high=high).to(h.dtype)


def mask(h: Tensor) -> Tensor:
    return like(h) > 0


def places(h: Tensor, axis: int = -1) -> Tensor:
    """Positions along an axis, repeated ones among them."""
    return (like(h, low=0.0, high=1.0) * h.shape[axis]).long().clamp(max=h.shape[axis] - 1)


def inside(h: Tensor) -> Tensor:
    """Into (-1, 1): the domain of asin, atanh, erfinv."""
    return 0.9 * torch.sin(h)


def above(h: Tensor, low: float = 0.5) -> Tensor:
    """Into (low, infinity)."""
    return h * h + low


def other(h: Tensor) -> Tensor:
    """Another tensor that depends on the same parameters, of the same shape."""
    return 0.7 * h.flip(-1) + 0.2


def assigned(h: Tensor, how: Callable[[Tensor], object]) -> Tensor:
    """A copy of `h`, changed in place."""
    copy = 1.0 * h
    how(copy)
    return copy


def _put(copy: Tensor, value: Tensor) -> None:
    copy[:, 1:3] = value


def _scale_slice(copy: Tensor) -> None:
    copy[:, ::2] *= 1.5


def _bend_slice(copy: Tensor) -> None:
    copy[:, :3].tanh_()


def spd(h: Tensor) -> Tensor:
    """Symmetric positive definite matrices."""
    return h @ h.mT + torch.eye(h.shape[-1], dtype=h.dtype)


ELEMENTWISE: dict[str, Operation] = {
    "abs": torch.abs,
    "acos": lambda h: torch.acos(inside(h)),
    "acosh": lambda h: torch.acosh(above(h, 1.2)),
    "alpha_dropout in eval": lambda h: F.alpha_dropout(h, 0.5, training=False),
    "angle": lambda h: torch.angle(h) * h,
    "asin": lambda h: torch.asin(inside(h)),
    "asinh": torch.asinh,
    "atan": torch.atan,
    "atanh": lambda h: torch.atanh(inside(h)),
    "ceil": lambda h: torch.ceil(h) + h,
    "celu": lambda h: F.celu(h, 0.5),
    "celu_": lambda h: F.celu(1.0 * h, 0.5, inplace=True),
    "clamp": lambda h: h.clamp(-0.4, 0.5),
    "clamp by tensors": lambda h: h.clamp(like(h, low=-0.6, high=-0.3), like(h, low=0.2, high=0.7)),
    "clamp_max": lambda h: h.clamp_max(0.3),
    "clamp_max by a tensor": lambda h: torch.clamp_max(h, like(h)),
    "clamp_min": lambda h: h.clamp_min(-0.3),
    "clamp_min by a tensor": lambda h: torch.clamp_min(h, like(h)),
    "copysign": lambda h: torch.copysign(h, like(h)),
    "cos": torch.cos,
    "cosh": torch.cosh,
    "deg2rad": lambda h: torch.deg2rad(50.0 * h),
    "digamma": lambda h: torch.digamma(above(h)),
    "dropout in eval": lambda h: F.dropout(h, 0.5, training=False),
    "elu": lambda h: F.elu(h, 0.7),
    "elu_": lambda h: F.elu(1.0 * h, 0.7, inplace=True),
    "erf": torch.erf,
    "erfc": torch.erfc,
    "erfinv": lambda h: torch.erfinv(inside(h)),
    "exp": torch.exp,
    "exp2": torch.exp2,
    "expm1": torch.expm1,
    "fix": lambda h: torch.fix(3 * h) + h,
    "floor": lambda h: torch.floor(h) + h,
    "float_power": lambda h: torch.float_power(above(h), 1.7).to(h.dtype),
    "frac": lambda h: torch.frac(3 * h),
    "gelu": F.gelu,
    "gelu tanh": lambda h: F.gelu(h, approximate="tanh"),
    "hardshrink": lambda h: F.hardshrink(h, 0.2),
    "hardsigmoid": lambda h: F.hardsigmoid(2 * h),
    "hardswish": lambda h: F.hardswish(3 * h),
    "hardtanh": lambda h: F.hardtanh(h, -0.3, 0.4),
    "heaviside": lambda h: h * torch.heaviside(h.detach(), like(h)),
    "i0": torch.special.i0,
    "i0e": torch.special.i0e,
    "i1": torch.special.i1,
    "i1e": torch.special.i1e,
    "ldexp": lambda h: torch.ldexp(h, torch.tensor([2])),
    "leaky_relu": lambda h: F.leaky_relu(h, 0.1),
    "leaky_relu_": lambda h: F.leaky_relu(1.0 * h, 0.1, inplace=True),
    "lgamma": lambda h: torch.lgamma(above(h)),
    "log": lambda h: torch.log(above(h)),
    "log10": lambda h: torch.log10(above(h)),
    "log1p": lambda h: torch.log1p(above(h)),
    "log2": lambda h: torch.log2(above(h)),
    "log_ndtr": torch.special.log_ndtr,
    "logit": lambda h: torch.logit(torch.sigmoid(h) * 0.9),
    "logit with eps": lambda h: torch.logit(torch.sigmoid(h), eps=0.1),
    "logsigmoid": F.logsigmoid,
    "mish": F.mish,
    "mish_": lambda h: F.mish(1.0 * h, inplace=True),
    "multigammaln": lambda h: torch.mvlgamma(above(h, 2.0), 2),
    "nan_to_num": torch.nan_to_num,
    "ndtr": torch.special.ndtr,
    "ndtri": lambda h: torch.special.ndtri(0.05 + 0.9 * torch.sigmoid(h)),
    "neg": torch.neg,
    "polygamma": lambda h: torch.polygamma(1, above(h)),
    "positive": torch.positive,
    "pow": lambda h: h**3,
    "pow by a fraction": lambda h: above(h) ** 1.3,
    "pow of a number": lambda h: 1.7**h,
    "rad2deg": lambda h: torch.rad2deg(0.02 * h),
    "reciprocal": lambda h: torch.reciprocal(above(h)),
    "relu": F.relu,
    "relu6": lambda h: F.relu6(4 * h),
    "relu_": lambda h: F.relu(1.0 * h, inplace=True),
    "remainder": lambda h: torch.remainder(h, 0.7),
    "fmod": lambda h: torch.fmod(h, 0.7),
    "round": lambda h: torch.round(3 * h) + h,
    "rrelu in eval": lambda h: F.rrelu(h, 0.1, 0.3, training=False),
    "rsqrt": lambda h: torch.rsqrt(above(h)),
    "selu": F.selu,
    "sgn": lambda h: torch.sgn(h) * h,
    "sigmoid": torch.sigmoid,
    "sigmoid_": lambda h: (1.0 * h).sigmoid_(),
    "sign": lambda h: torch.sign(h) * h,
    "silu": F.silu,
    "silu_": lambda h: F.silu(1.0 * h, inplace=True),
    "sin": torch.sin,
    "sin_": lambda h: (1.0 * h).sin_(),
    "sinc": torch.sinc,
    "sinh": torch.sinh,
    "softplus": lambda h: F.softplus(h, beta=2.0),
    "softshrink": lambda h: F.softshrink(h, 0.2),
    "softsign": F.softsign,
    "sqrt": lambda h: torch.sqrt(above(h)),
    "square": torch.square,
    "tan": torch.tan,
    "tanh": torch.tanh,
    "tanh_": lambda h: (1.0 * h).tanh_(),
    "tanhshrink": F.tanhshrink,
    "threshold": lambda h: F.threshold(h, 0.1, -0.5),
    "trunc": lambda h: torch.trunc(3 * h) + h,
    "xlog1py by a constant": lambda h: torch.special.xlog1py(like(h), above(h)),
    "xlogy by a constant": lambda h: torch.xlogy(like(h), above(h)),
    "xlogy of a constant": lambda h: torch.xlogy(h, like(h, low=0.2, high=2.0)),
    "entr": lambda h: torch.special.entr(above(h)),
    "erfcx": torch.special.erfcx,
    "zeta of a constant": lambda h: torch.special.zeta(torch.full_like(h, 2.5), above(h, 1.0)),
}

ARITHMETIC: dict[str, Operation] = {
    "add": lambda h: h + other(h),
    "add with alpha": lambda h: torch.add(h, other(h), alpha=-2.5),
    "add a number": lambda h: h + 0.3,
    "add_": lambda h: (1.0 * h).add_(other(h), alpha=0.3),
    "addcdiv": lambda h: torch.addcdiv(h, other(h), above(h.roll(1, -1)), value=0.6),
    "addcdiv by constants": lambda h: torch.addcdiv(h, like(h), like(h, low=1.0, high=2.0), value=0.6),
    "addcdiv live above": lambda h: torch.addcdiv(like(h), h, like(h, low=1.0, high=2.0)),
    "addcdiv live below": lambda h: torch.addcdiv(like(h), like(h), above(h)),
    "addcmul": lambda h: torch.addcmul(h, other(h), h.roll(1, -1), value=0.6),
    "addcmul by constants": lambda h: torch.addcmul(h, like(h), like(h), value=0.6),
    "addcmul of one": lambda h: torch.addcmul(like(h), h, like(h), value=0.6),
    "addcmul broadcast": lambda h: torch.addcmul(h, h.mean(-1, keepdim=True), h.roll(1, -1)),
    "atan2": lambda h: torch.atan2(h + 1.5, above(other(h))),
    "atan2 by a constant": lambda h: torch.atan2(h, like(h, low=0.5, high=2.0)),
    "div": lambda h: h / above(other(h)),
    "div broadcast": lambda h: h / above(h).sum(-1, keepdim=True),
    "div of a constant": lambda h: like(h) / above(h),
    "div of a number": lambda h: 2.0 / above(h),
    "div by itself": lambda h: h / (1 + h.abs()),
    "div by a number": lambda h: h / 3.0,
    "div_": lambda h: (1.0 * h).div_(above(other(h))),
    "divide with rounding": lambda h: torch.div(h, 0.3, rounding_mode="floor") + h,
    "fmax": lambda h: torch.fmax(h, other(h)),
    "fmin": lambda h: torch.fmin(h, other(h)),
    "fmod by a tensor": lambda h: torch.fmod(h, like(h, low=0.5, high=1.0)),
    "hypot": lambda h: torch.hypot(h + 2.0, other(h)),
    "lerp": lambda h: torch.lerp(h, other(h), 0.3),
    "lerp by a constant": lambda h: torch.lerp(h, other(h), like(h)),
    "lerp by a gate": lambda h: torch.lerp(h, other(h), torch.sigmoid(h.roll(1, -1))),
    "logaddexp": lambda h: torch.logaddexp(h, other(h)),
    "logaddexp2": lambda h: torch.logaddexp2(h, other(h)),
    "maximum": lambda h: torch.maximum(h, other(h)),
    "minimum": lambda h: torch.minimum(h, other(h)),
    "mul": lambda h: h * other(h),
    "mul broadcast": lambda h: h * torch.sigmoid(h.mean(-1, keepdim=True)),
    "mul by a constant": lambda h: h * like(h),
    "mul_": lambda h: (1.0 * h).mul_(other(h)),
    "pow by a tensor": lambda h: torch.pow(above(h), other(h)),
    "pow of a constant": lambda h: torch.pow(like(h, low=0.5, high=2.0), h),
    "remainder by a tensor": lambda h: torch.remainder(h, like(h, low=0.5, high=1.0)),
    "rsub": lambda h: torch.rsub(h, other(h), alpha=3),
    "sub": lambda h: h - other(h),
    "sub from a number": lambda h: 2.0 - h,
    "true_divide": lambda h: torch.true_divide(other(h), above(h)),
    "xlogy": lambda h: torch.xlogy(h, above(other(h))),
    "xlog1py": lambda h: torch.special.xlog1py(h, above(other(h))),
    "where": lambda h: torch.where(h > 0, other(h), 0.1 * h),
    "where of one": lambda h: torch.where(mask(h), h, torch.zeros_like(h)),
    "nextafter": lambda h: h + 0 * torch.nextafter(h.detach(), like(h)),
    "glu": lambda h: F.glu(h),
    "prelu by a constant": lambda h: F.prelu(h, torch.full((1,), 0.2, dtype=h.dtype)),
    "dist by elements": lambda h: torch.sqrt((h - other(h)) ** 2 + 0.1),
    "huber_loss": lambda h: F.huber_loss(h, like(h), reduction="none", delta=0.4),
    "l1_loss": lambda h: F.l1_loss(h, like(h), reduction="none"),
    "mse_loss": lambda h: F.mse_loss(h, like(h), reduction="none"),
    "mse_loss of two": lambda h: F.mse_loss(h, other(h), reduction="none"),
    "smooth_l1_loss": lambda h: F.smooth_l1_loss(h, like(h), reduction="none", beta=0.5),
    "soft_margin_loss": lambda h: F.soft_margin_loss(h, mask(h).to(h.dtype) * 2 - 1, reduction="none"),
    "binary_cross_entropy": lambda h: F.binary_cross_entropy(
        torch.sigmoid(h), like(h, low=0.1, high=0.9), reduction="none"
    ),
    "binary_cross_entropy_with_logits": lambda h: F.binary_cross_entropy_with_logits(
        h, like(h, low=0.1, high=0.9), reduction="none"
    ),
    "kl_div": lambda h: F.kl_div(h, like(h, low=0.1, high=0.9), reduction="none"),
    "poisson_nll_loss": lambda h: F.poisson_nll_loss(h, like(h, low=0.1, high=3.0), reduction="none"),
    "gaussian_nll_loss": lambda h: F.gaussian_nll_loss(h, like(h), above(other(h)), reduction="none"),
}

SHAPES: dict[str, Operation | tuple[tuple[int, ...], Operation]] = {
    "alias": lambda h: torch.ops.aten.alias(h),
    "as_strided": lambda h: torch.as_strided(h.contiguous(), (len(h), 3), (6, 2)),
    "atleast_3d": lambda h: torch.atleast_3d(h),
    "block_diag": lambda h: torch.stack([torch.block_diag(r[:2], r[2:]) for r in h]),
    "broadcast_to": lambda h: torch.broadcast_to(h[:, None], (len(h), 2, 6)),
    "cat": lambda h: torch.cat([h, 2 * h], -1),
    "cat with a constant": lambda h: torch.cat([like(h), h], -1),
    "channel_shuffle": (
        (4, 2, 2),
        lambda h: F.channel_shuffle(h, 2) if hasattr(F, "channel_shuffle") else torch.channel_shuffle(h, 2),
    ),
    "chunk": lambda h: h.chunk(2, -1)[0] - 2 * h.chunk(2, -1)[1],
    "clone": torch.clone,
    "column_stack": lambda h: torch.column_stack([h, other(h)]),
    "contiguous": (SQUARE, lambda h: h.mT.contiguous()),
    "constant_pad_nd": lambda h: F.pad(h, (1, 2), value=0.3),
    "crop by a negative pad": lambda h: F.pad(h, (-1, -2)),
    "diag_embed": lambda h: torch.diag_embed(h),
    "diagonal": (SQUARE, lambda h: h.diagonal(dim1=1, dim2=2)),
    "diagonal_scatter": (SQUARE, lambda h: torch.diagonal_scatter(h, 2 * h[:, 0], dim1=1, dim2=2)),
    "diff": lambda h: torch.diff(h),
    "dstack": lambda h: torch.dstack([h, other(h)]),
    "expand": lambda h: h.mean(-1, keepdim=True).expand(-1, 3),
    "expand_as": lambda h: h[:, :1].expand_as(h),
    "flatten": (SQUARE, lambda h: h.flatten(1)),
    "flip": lambda h: h.flip(-1),
    "fliplr": lambda h: torch.fliplr(h),
    "gather": lambda h: h.gather(-1, places(h)),
    "gradient": lambda h: torch.gradient(h, dim=-1)[0],
    "hsplit": lambda h: torch.hsplit(h, 2)[1],
    "hstack": lambda h: torch.hstack([h, other(h)]),
    "index": lambda h: h[:, [2, 0, 2]],
    "index_add": lambda h: h.index_add(1, torch.tensor([0, 0, 4]), 2 * h[:, 3:]),
    "index_copy": lambda h: h.index_copy(1, torch.tensor([5, 1]), h[:, 2:4] * 3),
    "index_fill": lambda h: h.index_fill(1, torch.tensor([0, 4]), 0.5),
    "index_put": lambda h: h.index_put((torch.arange(len(h)), torch.tensor(3)), 2 * h[:, 0]),
    "index_put accumulated": lambda h: h.index_put((torch.arange(len(h)), torch.tensor(3)), h[:, 0], accumulate=True),
    "index_reduce": lambda h: h.index_reduce(1, torch.tensor([0, 2]), 2 * h[:, 3:5], "amax"),
    "index_select": lambda h: h.index_select(-1, torch.tensor([3, 1])),
    "masked_fill": lambda h: h.masked_fill(mask(h), 0.5),
    "masked_scatter": lambda h: torch.stack([r.masked_scatter(mask(r), 2 * other(r)) for r in h]),
    "masked_select": lambda h: torch.masked_select(h, mask(h[0])).reshape(len(h), -1),
    "meshgrid": lambda h: torch.stack([torch.stack(torch.meshgrid(r[:2], r[2:], indexing="ij")) for r in h]),
    "moveaxis": (SQUARE, lambda h: torch.moveaxis(h, 1, 2)),
    "movedim": (SQUARE, lambda h: h.movedim(2, 1)),
    "narrow": lambda h: h.narrow(-1, 1, 3),
    "permute": (IMAGE, lambda h: h.permute(0, 2, -1, 1)),
    "pixel_shuffle": ((4, 2, 2), lambda h: F.pixel_shuffle(h, 2)),
    "pixel_unshuffle": ((1, 4, 4), lambda h: F.pixel_unshuffle(h, 2)),
    "put": lambda h: torch.stack([r.put(torch.tensor([1, 4]), 2 * r[:2]) for r in h]),
    "ravel": lambda h: torch.stack([r.ravel() for r in h]),
    "reflection_pad1d": lambda h: F.pad(h[:, None], (2, 1), mode="reflect"),
    "reflection_pad2d": (IMAGE, lambda h: F.pad(h, (1, 1, 2, 1), mode="reflect")),
    "replication_pad1d": lambda h: F.pad(h[:, None], (2, 1), mode="replicate"),
    "replication_pad2d": (IMAGE, lambda h: F.pad(h, (1, 1, 2, 1), mode="replicate")),
    "replication_pad3d": ((1, 2, 2, 2), lambda h: F.pad(h, (1, 1, 0, 1, 1, 0), mode="replicate")),
    "reflection_pad3d": ((1, 2, 2, 2), lambda h: F.pad(h, (1, 1, 0, 1, 1, 0), mode="reflect")),
    "circular pad": (IMAGE, lambda h: F.pad(h, (1, 1, 2, 1), mode="circular")),
    "repeat": lambda h: h.repeat(1, 2),
    "repeat_interleave": lambda h: h.repeat_interleave(2, -1),
    "repeat_interleave by a tensor": lambda h: h.repeat_interleave(torch.tensor([1, 2, 0, 1, 3, 1]), -1),
    "reshape": lambda h: h.reshape(len(h), 2, 3),
    "resolve_conj": lambda h: h.resolve_conj(),
    "roll": lambda h: h.roll(2, -1),
    "rot90": (SQUARE, lambda h: torch.rot90(h, 1, (1, 2))),
    "scatter": lambda h: h.scatter(-1, torch.tensor([[4, 0]]).expand(len(h), -1), 2 * h[:, 1:3]),
    "scatter a number": lambda h: h.scatter(-1, torch.tensor([[4, 0]]).expand(len(h), -1), 0.5),
    "scatter_add": lambda h: h.scatter_add(-1, places(h), other(h)),
    "scatter_reduce amax": lambda h: h.scatter_reduce(-1, places(h), other(h), "amax"),
    "scatter_reduce mean": lambda h: h.scatter_reduce(-1, places(h), other(h), "mean"),
    "scatter_reduce prod": lambda h: above(h).scatter_reduce(-1, places(h), above(other(h)), "prod"),
    "scatter_reduce sum": lambda h: h.scatter_reduce(-1, places(h), other(h), "sum"),
    "select": (SQUARE, lambda h: h[:, 1]),
    "select_scatter": (SQUARE, lambda h: torch.select_scatter(h, 2 * h[:, 0], 1, 2)),
    "slice": lambda h: h[:, 1:5:2],
    "slice_scatter": lambda h: torch.slice_scatter(h, 2 * h[:, :2], 1, 3, 5),
    "slices assigned": lambda h: assigned(h, lambda c: _put(c, 2 * h[:, :2])),
    "slices assigned a number": lambda h: assigned(h, lambda c: c[:, 1:3].fill_(0.5)),
    "slices scaled in place": lambda h: assigned(h, _scale_slice),
    "slices bent in place": lambda h: assigned(h, _bend_slice),
    "split": lambda h: h.split(2, -1)[0] - 3 * h.split(2, -1)[1],
    "split by sizes": lambda h: h.split([1, 2, 3], -1)[2],
    "squeeze": lambda h: h[:, :1].squeeze(1),
    "stack": lambda h: torch.stack([h, other(h)], 1),
    "swapaxes": (SQUARE, lambda h: h.swapaxes(1, 2)),
    "take": lambda h: torch.stack([r.take(torch.tensor([4, 0, 4])) for r in h]),
    "take_along_dim": lambda h: torch.take_along_dim(h, places(h), -1),
    "tensor_split": lambda h: h.tensor_split(4, -1)[0],
    "tile": lambda h: h.tile(1, 2),
    "transpose": (SQUARE, lambda h: h.transpose(1, 2)),
    "tril": (SQUARE, lambda h: h.tril()),
    "triu": (SQUARE, lambda h: h.triu(1)),
    "unbind": (SQUARE, lambda h: h.unbind(1)[0] + h.unbind(1)[2]),
    "unflatten": lambda h: h.unflatten(-1, (2, 3)),
    "unfold a tensor": lambda h: h.unfold(-1, 3, 1),
    "unfold": (IMAGE, lambda h: F.unfold(h, 2)),
    "fold": ((4, 4), lambda h: F.fold(h, (3, 3), 2)),
    "unsqueeze": lambda h: h.unsqueeze(1),
    "vander": lambda h: torch.linalg.vander(h, N=3),
    "view": lambda h: h.view(len(h), 3, 2),
    "view_as_real of a constant sum": lambda h: torch.view_as_real(torch.complex(h, other(h))),
    "vsplit": (SQUARE, lambda h: torch.stack([torch.vsplit(r, 3)[1] for r in h])),
    "to another dtype": lambda h: h.to(torch.float64).to(h.dtype),
    "vstack": lambda h: torch.stack([torch.vstack([r[:3], r[3:]]) for r in h]),
}

REDUCTIONS: dict[str, Operation | tuple[tuple[int, ...], Operation]] = {
    "amax": lambda h: h.amax(-1),
    "amin": lambda h: h.amin(-1),
    "aminmax": lambda h: torch.stack(torch.aminmax(h, dim=-1), -1),
    "count_nonzero aside": lambda h: h * h.detach().count_nonzero(-1)[:, None],
    "cummax": lambda h: h.cummax(-1)[0],
    "cummin": lambda h: h.cummin(-1)[0],
    "cumprod": lambda h: above(h).cumprod(-1),
    "cumsum": lambda h: h.cumsum(-1),
    "cumulative_trapezoid": lambda h: torch.cumulative_trapezoid(h),
    "kthvalue": lambda h: h.kthvalue(2, -1)[0],
    "logcumsumexp": lambda h: h.logcumsumexp(-1),
    "logsumexp": lambda h: h.logsumexp(-1),
    "max": lambda h: h.max(-1)[0],
    "mean": lambda h: h.mean(-1),
    "median": lambda h: h.median(-1)[0],
    "min": lambda h: h.min(-1)[0],
    "mode": lambda h: h.mode(-1)[0],
    "msort": lambda h: torch.stack([torch.msort(r) for r in h]),
    "nanmean": lambda h: h.nanmean(-1),
    "nanmedian": lambda h: h.nanmedian(-1)[0],
    "nansum": lambda h: h.nansum(-1),
    "norm": lambda h: h.norm(dim=-1),
    "norm of order 1": lambda h: h.norm(p=1, dim=-1),
    "norm of order 3": lambda h: h.norm(p=3, dim=-1),
    "norm of infinite order": lambda h: h.norm(p=float("inf"), dim=-1),
    "prod": lambda h: above(h).prod(-1),
    "quantile": lambda h: h.quantile(0.4, dim=-1),
    "nanquantile": lambda h: h.nanquantile(0.4, dim=-1),
    "renorm": lambda h: torch.stack([torch.renorm(r.reshape(2, 3), 2, 0, 0.5) for r in h]),
    "sort": lambda h: h.sort(-1)[0],
    "std": lambda h: h.std(-1),
    "std_mean": lambda h: torch.stack(torch.std_mean(h, -1), -1),
    "sum": lambda h: h.sum(-1),
    "topk": lambda h: h.topk(3, -1)[0],
    "trapezoid": lambda h: torch.trapezoid(h),
    "var": lambda h: h.var(-1),
    "var_mean": lambda h: torch.stack(torch.var_mean(h, -1), -1),
    "segment_reduce": lambda h: torch.stack(
        [torch.segment_reduce(r, "sum", lengths=torch.tensor([2, 4]), unsafe=True) for r in h]
    ),
}

NORMALISING: dict[str, Operation | tuple[tuple[int, ...], Operation]] = {
    "batch_norm in eval": (IMAGE, lambda h: F.batch_norm(h, like(h, 2), like(h, 2, low=0.5, high=2.0))),
    "cosine_similarity": lambda h: F.cosine_similarity(h, other(h)),
    "group_norm": ((4, 2, 2), lambda h: F.group_norm(h, 2)),
    "gumbel_softmax without noise": lambda h: F.softmax(h / 0.7, -1),
    "instance_norm": (IMAGE, lambda h: F.instance_norm(h)),
    "layer_norm": lambda h: F.layer_norm(h, (6,)),
    "local_response_norm": ((4, 2, 2), lambda h: F.local_response_norm(h, 3)),
    "log_softmax": lambda h: F.log_softmax(h, -1),
    "normalize": lambda h: F.normalize(h, dim=-1),
    "pairwise_distance": lambda h: F.pairwise_distance(h, other(h)),
    "rms_norm": lambda h: F.rms_norm(h, (6,)),
    "softmax": lambda h: F.softmax(h, -1),
    "softmin": lambda h: F.softmin(h, -1),
    "cdist": ((3, 2), lambda h: torch.cdist(h, 0.7 * h.flip(1) + 0.2)),
    "triplet_margin_loss": lambda h: F.triplet_margin_loss(h, other(h), 2 * h.roll(1, -1), reduction="none"),
    "cross_entropy inside": lambda h: F.cross_entropy(h, torch.arange(len(h)), reduction="none"),
    "multi_margin_loss": lambda h: F.multi_margin_loss(h, torch.arange(len(h)), reduction="none"),
    "multilabel_margin_loss": lambda h: F.multilabel_margin_loss(
        h, torch.tensor([[0, 3, -1, 0, 0, 0]]).expand(len(h), -1), reduction="none"
    ),
    "multilabel_soft_margin_loss": lambda h: F.multilabel_soft_margin_loss(h, mask(h).to(h.dtype), reduction="none"),
    "nll_loss inside": lambda h: F.nll_loss(h, torch.arange(len(h)), reduction="none"),
    "hinge_embedding_loss": lambda h: F.hinge_embedding_loss(h, mask(h).to(h.dtype) * 2 - 1, reduction="none"),
    "margin_ranking_loss": lambda h: F.margin_ranking_loss(h, other(h), torch.ones_like(h), reduction="none"),
    "cosine_embedding_loss": lambda h: F.cosine_embedding_loss(
        h, other(h), torch.ones(len(h), dtype=h.dtype), reduction="none"
    ),
}

POOLING: dict[str, Operation | tuple[tuple[int, ...], Operation]] = {
    "adaptive_avg_pool1d": lambda h: F.adaptive_avg_pool1d(h[:, None], 4),
    "adaptive_avg_pool2d": (IMAGE, lambda h: F.adaptive_avg_pool2d(h, (3, 2))),
    "adaptive_avg_pool2d to one": (IMAGE, lambda h: F.adaptive_avg_pool2d(h, 1)),
    "adaptive_avg_pool2d of channels last": (
        IMAGE,
        lambda h: F.adaptive_avg_pool2d(h.to(memory_format=torch.channels_last), 1),
    ),
    "adaptive_avg_pool3d": ((1, 2, 3, 2), lambda h: F.adaptive_avg_pool3d(h, (1, 2, 2))),
    "adaptive_max_pool1d": lambda h: F.adaptive_max_pool1d(h[:, None], 4),
    "adaptive_max_pool2d": (IMAGE, lambda h: F.adaptive_max_pool2d(h, (3, 2))),
    "adaptive_max_pool3d": ((1, 2, 3, 2), lambda h: F.adaptive_max_pool3d(h, (1, 2, 2))),
    "avg_pool1d": lambda h: F.avg_pool1d(h[:, None], 2),
    "avg_pool2d": (IMAGE, lambda h: F.avg_pool2d(h, 3, 2, 1, ceil_mode=True, count_include_pad=False)),
    "avg_pool3d": ((1, 2, 3, 2), lambda h: F.avg_pool3d(h, 2, 1)),
    "fractional_max_pool2d": (
        IMAGE,
        lambda h: F.fractional_max_pool2d(h, 2, 3, _random_samples=torch.full((len(h), 2, 2), 0.3, dtype=h.dtype)),
    ),
    "lp_pool1d": lambda h: F.lp_pool1d(above(h)[:, None], 2, 2),
    "lp_pool2d": (IMAGE, lambda h: F.lp_pool2d(above(h), 2, 2)),
    "max_pool1d": lambda h: F.max_pool1d(h[:, None], 2),
    "max_pool1d with indices": lambda h: F.max_pool1d(h[:, None], 2, return_indices=True)[0],
    "max_pool2d": (IMAGE, lambda h: F.max_pool2d(h, 3, 1, 1)),
    "max_pool3d": ((1, 2, 3, 2), lambda h: F.max_pool3d(h, 2, 1)),
    "max_unpool1d": lambda h: F.max_unpool1d(*F.max_pool1d(h[:, None], 2, return_indices=True), 2),
    "max_unpool2d": (IMAGE, lambda h: F.max_unpool2d(*F.max_pool2d(h, 2, return_indices=True), 2)),
    "interpolate area": (IMAGE, lambda h: F.interpolate(h, size=(2, 3), mode="area")),
    "interpolate bicubic": (IMAGE, lambda h: F.interpolate(h, size=(3, 5), mode="bicubic")),
    "interpolate bilinear": (IMAGE, lambda h: F.interpolate(h, size=(5, 3), mode="bilinear", align_corners=True)),
    "interpolate bilinear with antialias": (
        IMAGE,
        lambda h: F.interpolate(h, size=(3, 3), mode="bilinear", antialias=True),
    ),
    "interpolate bicubic with antialias": (
        IMAGE,
        lambda h: F.interpolate(h, size=(3, 3), mode="bicubic", antialias=True),
    ),
    "interpolate linear": lambda h: F.interpolate(h[:, None], size=4, mode="linear"),
    "interpolate nearest": (IMAGE, lambda h: F.interpolate(h, scale_factor=2)),
    "interpolate nearest 1d": lambda h: F.interpolate(h[:, None], size=4),
    "interpolate nearest 3d": ((1, 2, 2, 2), lambda h: F.interpolate(h, scale_factor=2)),
    "interpolate nearest-exact": (IMAGE, lambda h: F.interpolate(h, size=(3, 5), mode="nearest-exact")),
    "interpolate trilinear": ((1, 2, 2, 2), lambda h: F.interpolate(h, size=(3, 3, 2), mode="trilinear")),
    "grid_sample": (IMAGE, lambda h: F.grid_sample(h, like(h, len(h), 2, 3, 2), align_corners=False)),
    "grid_sample nearest": (
        IMAGE,
        lambda h: F.grid_sample(h, like(h, len(h), 2, 3, 2), mode="nearest", align_corners=False),
    ),
    "grid_sample bicubic": (
        IMAGE,
        lambda h: F.grid_sample(h, like(h, len(h), 2, 3, 2), mode="bicubic", align_corners=False),
    ),
    "grid_sample 3d": ((1, 2, 2, 2), lambda h: F.grid_sample(h, like(h, len(h), 2, 1, 2, 3), align_corners=False)),
    "grid_sample of a live grid": (
        (2, 3, 2),
        lambda h: F.grid_sample(like(h, len(h), 1, 4, 4), 0.4 * h, align_corners=False),
    ),
    "affine_grid": ((2, 3), lambda h: F.affine_grid(h, [len(h), 1, 2, 2], align_corners=False)),
    "affine transform of a live image": (
        IMAGE,
        lambda h: F.grid_sample(
            h, F.affine_grid(like(h, len(h), 2, 3), [len(h), 2, 3, 3], align_corners=False), align_corners=False
        ),
    ),
}

MATRICES: dict[str, Operation | tuple[tuple[int, ...], Operation]] = {
    "addbmm of constants": (
        SQUARE,
        lambda h: torch.stack([torch.addbmm(r, like(h, 2, 3, 2), like(h, 2, 2, 3)) for r in h]),
    ),
    "addmm of constants": lambda h: torch.addmm(like(h, 3), h, like(h, 6, 3)),
    "addmm with factors": lambda h: torch.addmm(h[:, :3], h, like(h, 6, 3), beta=0.5, alpha=2.0),
    "baddbmm": (SQUARE, lambda h: torch.baddbmm(h, h, other(h), beta=0.5, alpha=0.7)),
    "baddbmm of a constant": (SQUARE, lambda h: torch.baddbmm(h, h, like(h), beta=0.5, alpha=0.7)),
    "bilinear of a constant": lambda h: F.bilinear(h[:, :2], h[:, 2:4], like(h, 3, 2, 2)),
    "bmm": (SQUARE, lambda h: torch.bmm(h, other(h))),
    "bmm by a constant": (SQUARE, lambda h: torch.bmm(h, like(h))),
    "chain_matmul": (SQUARE, lambda h: torch.stack([torch.linalg.multi_dot([r, r.T, like(h, 3, 2)]) for r in h])),
    "cholesky": (SQUARE, lambda h: torch.linalg.cholesky(spd(h))),
    "conv1d by a constant": lambda h: F.conv1d(h[:, None], like(h, 2, 1, 3)),
    "conv2d by a constant": (IMAGE, lambda h: F.conv2d(h, like(h, 3, 2, 2, 2), padding=1, stride=2)),
    "conv3d by a constant": ((1, 2, 2, 2), lambda h: F.conv3d(h, like(h, 2, 1, 2, 1, 1))),
    "conv_transpose1d by a constant": lambda h: F.conv_transpose1d(h[:, None], like(h, 1, 2, 3), stride=2),
    "conv_transpose2d by a constant": ((2, 2, 2), lambda h: F.conv_transpose2d(h, like(h, 2, 3, 2, 2), stride=2)),
    "conv_transpose3d by a constant": ((1, 2, 2, 2), lambda h: F.conv_transpose3d(h, like(h, 1, 2, 2, 1, 1))),
    "conv_tbc": ((1, 3), lambda h: torch.conv_tbc(h.permute(1, 0, 2), like(h, 1, 3, 2), like(h, 2)).permute(1, 0, 2)),
    "corrcoef": lambda h: torch.stack([torch.corrcoef(r.reshape(2, 3)) for r in h]),
    "cov": lambda h: torch.stack([torch.cov(r.reshape(2, 3)) for r in h]),
    "cross": ((3,), lambda h: torch.linalg.cross(h, h.roll(1, -1) * 0.7 + 0.1)),
    "cross with a constant": ((3,), lambda h: torch.linalg.cross(h, like(h))),
    "det": (SQUARE, lambda h: torch.linalg.det(h)),
    "dot": lambda h: torch.stack([torch.dot(r, r.flip(0)) for r in h]),
    "eigvalsh": (SQUARE, lambda h: torch.linalg.eigvalsh(spd(h))),
    "einsum by a constant": (SQUARE, lambda h: torch.einsum("nij,jk->nik", h, like(h, 3, 2))),
    "einsum of two": (SQUARE, lambda h: torch.einsum("nij,njk->nik", h, other(h))),
    "expm": (SQUARE, lambda h: torch.linalg.matrix_exp(0.3 * h)),
    "inner by a constant": lambda h: torch.inner(h, like(h, 3, 6)),
    "inverse": (SQUARE, lambda h: torch.linalg.inv(spd(h))),
    "kron": lambda h: torch.stack([torch.kron(r[:2], r[2:]) for r in h]),
    "kron with a constant": lambda h: torch.stack([torch.kron(r, like(h, 2)) for r in h]),
    "linear by a constant": lambda h: F.linear(h, like(h, 3, 6), like(h, 3)),
    "logdet": (SQUARE, lambda h: torch.logdet(spd(h))),
    "lu": (SQUARE, lambda h: torch.linalg.lu(spd(h))[2]),
    "matmul": (SQUARE, lambda h: h @ other(h)),
    "matmul by a constant": (SQUARE, lambda h: h @ like(h, 3, 2)),
    "matmul from the left": (SQUARE, lambda h: like(h, 2, 3) @ h),
    "matrix_norm": (SQUARE, lambda h: torch.linalg.matrix_norm(h)),
    "matrix_power": (SQUARE, lambda h: torch.linalg.matrix_power(h, 2)),
    "mm by a constant": lambda h: torch.mm(h, like(h, 6, 2)),
    "mv of a constant": (SQUARE, lambda h: torch.stack([torch.mv(r, like(h, 3)) for r in h])),
    "multi_head_attention by constants": (
        (3, 2),
        lambda h: F.multi_head_attention_forward(
            *(h.transpose(0, 1),) * 3,
            2,
            1,
            like(h, 6, 2),
            like(h, 6),
            None,
            None,
            False,
            0.0,
            like(h, 2, 2),
            like(h, 2),
            training=False,
            need_weights=False,
        )[0].transpose(0, 1),
    ),
    "outer with a constant": lambda h: torch.stack([torch.outer(r, like(h, 2)) for r in h]),
    "outer": lambda h: torch.einsum("ni,nj->nij", h[:, :2], h[:, 2:]),
    "pinv": (SQUARE, lambda h: torch.linalg.pinv(spd(h))),
    "qr": (SQUARE, lambda h: torch.linalg.qr(spd(h))[1]),
    "scaled_dot_product_attention": ((3, 2), lambda h: F.scaled_dot_product_attention(h, other(h), 0.5 * h)),
    "scaled_dot_product_attention of a constant": (
        (3, 2),
        lambda h: F.scaled_dot_product_attention(like(h), like(h), h),
    ),
    "slogdet": (SQUARE, lambda h: torch.linalg.slogdet(spd(h))[1]),
    "solve": (SQUARE, lambda h: torch.linalg.solve(spd(h), like(h))),
    "solve for a live side": (SQUARE, lambda h: torch.linalg.solve(spd(like(h)), h)),
    "solve_triangular": (SQUARE, lambda h: torch.linalg.solve_triangular(spd(like(h)), h, upper=True)),
    "svdvals": (SQUARE, lambda h: torch.linalg.svdvals(spd(h))),
    "tensordot by a constant": (SQUARE, lambda h: torch.tensordot(h, like(h, 3, 2), 1)),
    "trace": (SQUARE, lambda h: torch.stack([r.trace() for r in h])),
    "tensorinv": (SQUARE, lambda h: torch.stack([torch.linalg.tensorinv(r, ind=1) for r in spd(h)])),
    "vecdot": lambda h: torch.linalg.vecdot(h, other(h)),
    "vecdot with a constant": lambda h: torch.linalg.vecdot(h, like(h)),
    "vector_norm": lambda h: torch.linalg.vector_norm(h, dim=-1),
    "householder_product": (SQUARE, lambda h: torch.linalg.householder_product(h, like(h, len(h), 3))),
    "sparse product": lambda h: torch.sparse.mm(like(h, 4, 6).to_sparse(), h.T).T,
    "embedding_bag by live weights": lambda h: F.embedding_bag(
        torch.arange(6).reshape(1, 6).expand(len(h), -1), like(h, 6, 2), mode="sum", per_sample_weights=h
    ),
}

FOURIER: dict[str, Operation | tuple[tuple[int, ...], Operation]] = {
    "fft": lambda h: torch.view_as_real(torch.fft.fft(h)),
    "fft2": (SQUARE, lambda h: torch.fft.fft2(h).real),
    "fftn": (SQUARE, lambda h: torch.fft.fftn(h, dim=(1, 2)).imag),
    "fftshift": lambda h: torch.fft.fftshift(h, dim=-1),
    "hfft": lambda h: torch.fft.hfft(h),
    "ifft": lambda h: torch.fft.ifft(h).real,
    "ihfft": lambda h: torch.view_as_real(torch.fft.ihfft(h).resolve_conj()),
    "irfft": lambda h: torch.fft.irfft(torch.fft.rfft(h)),
    "irfft of filtered": lambda h: torch.fft.irfft(torch.fft.rfft(h) * torch.fft.rfft(like(h))),
    "rfft": lambda h: torch.view_as_real(torch.fft.rfft(h)),
    "rfft2": (IMAGE, lambda h: torch.view_as_real(torch.fft.rfft2(h))),
    "abs of a spectrum": lambda h: torch.fft.rfft(h).abs(),
    "angle of a spectrum": lambda h: torch.angle(torch.fft.rfft(h)[:, 1:-1]),
    "product of spectra": lambda h: torch.fft.irfft(torch.fft.rfft(h) * torch.fft.rfft(other(h))),
    "complex": lambda h: torch.complex(h, other(h)).real,
    "conj": lambda h: torch.complex(h, other(h)).conj().imag,
    "polar": lambda h: torch.polar(above(h), other(h)).imag,
    "view_as_complex": ((3, 2), lambda h: (torch.view_as_complex(h) * (1 + 2j)).real),
    "stft": lambda h: torch.view_as_real(torch.stft(h, 4, 2, window=torch.ones(4, dtype=h.dtype), return_complex=True)),
}

OPERATIONS: dict[str, tuple[tuple[int, ...], Operation]] = {
    name: entry if isinstance(entry, tuple) else (WIDTH, entry)
    for table in (ELEMENTWISE, ARITHMETIC, SHAPES, REDUCTIONS, NORMALISING, POOLING, MATRICES, FOURIER)
    for name, entry in table.items()
}
