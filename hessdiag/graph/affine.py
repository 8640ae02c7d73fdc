"""Closed rules for affine nodes without parameters: a tangent [K, *shape] of the input becomes one of the output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hessdiag.graph import saved
from hessdiag.graph.nodes import edge_shape, sizes
from hessdiag.graph.tangents import aligned, broadcast

_RESHAPES = tuple(
    f"{name}Backward{number}"
    for name, number in (
        ("View", 0), ("UnsafeView", 0), ("ReshapeAlias", 0), ("Squeeze", 0), ("Squeeze", 1), ("Squeeze", 2),
        ("Unsqueeze", 0), ("Unsqueeze", 1), ("Alias", 0), ("Clone", 0),
    )
)  # fmt: skip


def _reshape(node: Any, slot: int, value: Tensor, shape: torch.Size) -> Tensor:
    return value.reshape(len(value), *shape)


def _expand(node: Any, slot: int, value: Tensor, shape: torch.Size) -> Tensor:
    return broadcast(value, shape).expand(len(value), *shape)


def sign_of(node: Any, slot: int) -> float:
    """What a sum or a difference multiplies its input `slot` by: 1, -1 or alpha."""
    name = node.name()
    if name == "RsubBackward0":
        return 1.0 if slot == 1 else -saved.number(node, "alpha", 1.0)
    alpha = saved.number(node, "alpha", 1.0) if slot == 1 else 1.0
    return -alpha if name == "SubBackward0" and slot == 1 else alpha


def _sum(node: Any, slot: int, value: Tensor, shape: torch.Size) -> Tensor:
    sign, moved = sign_of(node, slot), _expand(node, slot, value, shape)
    return moved if sign == 1.0 else moved * sign


def _dims(node: Any, ndim: int) -> list[int]:
    return [dim % ndim + 1 for dim in saved.integers(node, "dim") or range(ndim)]


def _mean(node: Any, slot: int, value: Tensor, shape: torch.Size) -> Tensor:
    return value.mean(_dims(node, value.ndim - 1), keepdim=True).reshape(len(value), *shape)


def _total(node: Any, slot: int, value: Tensor, shape: torch.Size) -> Tensor:
    return value.sum(_dims(node, value.ndim - 1), keepdim=True).reshape(len(value), *shape)


def _avg_pool(node: Any, slot: int, value: Tensor, shape: torch.Size) -> Tensor:
    divisor = saved.number_or_none(node, "divisor_override")
    moved = F.avg_pool2d(
        value.flatten(0, -4),
        saved.integers(node, "kernel_size"),
        saved.integers(node, "stride") or None,
        saved.integers(node, "padding"),
        saved.flag(node, "ceil_mode"),
        saved.flag(node, "count_include_pad"),
        None if divisor is None else int(divisor),
    )
    return moved.reshape(len(value), *shape)


def _adaptive_pool(node: Any, slot: int, value: Tensor, shape: torch.Size) -> Tensor:
    return F.adaptive_avg_pool2d(value.flatten(0, -4), (shape[-2], shape[-1])).reshape(len(value), *shape)


def _max_pool(node: Any, slot: int, value: Tensor, shape: torch.Size) -> Tensor:
    where = saved.tensor(node, "result1").flatten(-2)
    flat = value.flatten(-2)
    return flat.gather(-1, where.expand(len(value), *where.shape)).reshape(len(value), *shape)


def _permute(node: Any, slot: int, value: Tensor, shape: torch.Size) -> Tensor:
    ndim = value.ndim - 1
    return value.permute(0, *(d % ndim + 1 for d in saved.integers(node, "dims")))


def _transpose(node: Any, slot: int, value: Tensor, shape: torch.Size) -> Tensor:
    ndim = value.ndim - 1
    first, second = saved.integer(node, "dim0"), saved.integer(node, "dim1")
    return value.transpose(first % ndim + 1, second % ndim + 1)


DENSE: dict[str, Callable[[Any, int, Tensor, torch.Size], Tensor]] = {
    **dict.fromkeys(_RESHAPES, _reshape),
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

_SAME = frozenset({"AliasBackward0", "CloneBackward0", "AddBackward1", "SubBackward1"})


def factor(node: Any, slot: int) -> tuple[bool, Tensor | None]:
    """(True, d out/d in) where an affine node acts entry by entry on the input in `slot`; None stands for 1."""
    name = node.name()
    if name in _SAME or (name in ("AddBackward0", "SubBackward0") and slot == 0):
        return True, None
    if name in ("AddBackward0", "SubBackward0"):
        sign = sign_of(node, slot)
        return True, None if sign == 1 else _scalar(sign, node)
    if name in ("NegBackward0", "RsubBackward1"):
        return True, _scalar(-1.0, node)
    if name == "DivBackward0" and slot == 0:
        return True, aligned(saved.constant(node, slot), edge_shape((node, 0)))
    return False, None


def _scalar(value: float, node: Any) -> Tensor:
    meta = sizes(node)
    return torch.full((), value, dtype=meta.dtype, device=meta.device)
