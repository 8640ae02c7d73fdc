"""Closed rules for affine nodes: how a tangent [K, *shape] of the input becomes one of the output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_RESHAPES = tuple(
    f"{name}Backward{number}"
    for name, number in (
        ("View", 0), ("UnsafeView", 0), ("ReshapeAlias", 0), ("Squeeze", 0), ("Squeeze", 1), ("Squeeze", 2),
        ("Unsqueeze", 0), ("Unsqueeze", 1), ("Alias", 0), ("Clone", 0),
    )
)  # fmt: skip


def broadcast(value: Tensor, shape: torch.Size) -> Tensor:
    """[K, *small] -> [K, *1s, *small], which broadcasts against [K, *shape]."""
    return value.reshape(len(value), *(1,) * (len(shape) + 1 - value.ndim), *value.shape[1:])


def _reshape(node: Any, slot: int, value: Tensor, shape: torch.Size) -> Tensor:
    return value.reshape(len(value), *shape)


def _expand(node: Any, slot: int, value: Tensor, shape: torch.Size) -> Tensor:
    return broadcast(value, shape).expand(len(value), *shape)


def _sum(node: Any, slot: int, value: Tensor, shape: torch.Size) -> Tensor:
    sign = 1.0
    if slot == 1 or node.name() == "RsubBackward0":
        sign = float(getattr(node, "_saved_alpha", 1))
    negative = (node.name() == "SubBackward0" and slot == 1) or (node.name() == "RsubBackward0" and slot == 0)
    if node.name() == "RsubBackward0" and slot == 1:
        sign = 1.0
    moved = _expand(node, slot, value, shape)
    return moved if sign == 1.0 and not negative else moved * (-sign if negative else sign)


def _linear(node: Any, slot: int, value: Tensor, shape: torch.Size) -> Tensor | None:
    if slot != {"AddmmBackward0": 1, "MmBackward0": 0, "LinearBackward0": 0}[node.name()]:
        return None
    matrix = node._saved_weight.detach().T if node.name() == "LinearBackward0" else node._saved_mat2.detach()
    moved: Tensor = value @ matrix
    alpha = float(getattr(node, "_saved_alpha", 1))
    return moved if alpha == 1.0 else moved * alpha


def _dims(node: Any, ndim: int) -> list[int]:
    dims = node._saved_dim
    dims = [dims] if isinstance(dims, int) else list(dims or range(ndim))
    wrapped = [d - (1 << 64) if d >= 1 << 63 else d for d in dims]
    return [(d + ndim if d < 0 else d) + 1 for d in wrapped]


def _mean(node: Any, slot: int, value: Tensor, shape: torch.Size) -> Tensor:
    return value.mean(_dims(node, value.ndim - 1), keepdim=True).reshape(len(value), *shape)


def _total(node: Any, slot: int, value: Tensor, shape: torch.Size) -> Tensor:
    return value.sum(_dims(node, value.ndim - 1), keepdim=True).reshape(len(value), *shape)


def _avg_pool(node: Any, slot: int, value: Tensor, shape: torch.Size) -> Tensor:
    moved = F.avg_pool2d(
        value.flatten(0, -4), node._saved_kernel_size, node._saved_stride or None, node._saved_padding,
        node._saved_ceil_mode, node._saved_count_include_pad, node._saved_divisor_override,
    )  # fmt: skip
    return moved.reshape(len(value), *shape)


def _adaptive_pool(node: Any, slot: int, value: Tensor, shape: torch.Size) -> Tensor:
    return F.adaptive_avg_pool2d(value.flatten(0, -4), (shape[-2], shape[-1])).reshape(len(value), *shape)


def _max_pool(node: Any, slot: int, value: Tensor, shape: torch.Size) -> Tensor:
    where = node._saved_result1.flatten(-2)
    flat = value.flatten(-2)
    return flat.gather(-1, where.expand(len(value), *where.shape)).reshape(len(value), *shape)


def _permute(node: Any, slot: int, value: Tensor, shape: torch.Size) -> Tensor:
    ndim = value.ndim - 1
    dims = [d - (1 << 64) if d >= 1 << 63 else d for d in node._saved_dims]
    return value.permute(0, *(d % ndim + 1 for d in dims))


def _transpose(node: Any, slot: int, value: Tensor, shape: torch.Size) -> Tensor:
    ndim = value.ndim - 1
    first, second = (d - (1 << 64) if d >= 1 << 63 else d for d in (node._saved_dim0, node._saved_dim1))
    return value.transpose(first % ndim + 1, second % ndim + 1)


DENSE: dict[str, Callable[[Any, int, Tensor, torch.Size], Tensor | None]] = {
    **dict.fromkeys(_RESHAPES, _reshape),
    **dict.fromkeys(("AddmmBackward0", "MmBackward0", "LinearBackward0"), _linear),
    **dict.fromkeys(("AddBackward0", "SubBackward0", "RsubBackward0"), _sum),
    "ExpandBackward0": _expand,
    "MeanBackward1": _mean,
    "SumBackward1": _total,
    "AvgPool2DBackward0": _avg_pool,
    "AdaptiveAvgPool2DBackward0": _adaptive_pool,
    "MaxPool2DWithIndicesBackward0": _max_pool,
    "PermuteBackward0": _permute,
    "TransposeBackward0": _transpose,
}
