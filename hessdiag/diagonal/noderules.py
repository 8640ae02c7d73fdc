"""How single nodes of an autograd graph move tangents forward: closed rules for common kinds, double backward
else.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..sites.elementwise import derivatives, is_elementwise
from ..sites.graph import BATCH_NORM, Edge
from ..sites.linearise import edge_shape

if TYPE_CHECKING:
    from .pushforward import Tangent

Given = tuple[int, Edge, "Tangent"]
Cache = dict[tuple[str, int, int], Any]

_SAME = frozenset({"AliasBackward0", "CloneBackward0", "AddBackward1", "SubBackward1"})
_RESHAPES = tuple(
    f"{name}Backward{number}"
    for name, number in (
        ("View", 0), ("UnsafeView", 0), ("ReshapeAlias", 0), ("Squeeze", 0), ("Squeeze", 1), ("Squeeze", 2),
        ("Unsqueeze", 0), ("Unsqueeze", 1), ("Alias", 0), ("Clone", 0),
    )
)  # fmt: skip


def factor_of(node: Any, slot: int) -> tuple[bool, Tensor | None]:
    """(True, d out/d in) where a node acts elementwise on the input in `slot`; None stands for 1."""
    name = node.name()
    if is_elementwise(node):
        return True, derivatives(node)[0]
    if name in BATCH_NORM:
        return (True, _norm_factor(node)) if slot == 0 else (False, None)
    if name in _SAME or (name in ("AddBackward0", "SubBackward0") and slot == 0):
        return True, None
    if name == "AddBackward0":
        return True, None if node._saved_alpha == 1 else _scalar(float(node._saved_alpha), node)
    if name == "SubBackward0":
        return True, _scalar(-float(node._saved_alpha), node)
    if name in ("NegBackward0", "RsubBackward1"):
        return True, _scalar(-1.0, node)
    if name == "MulBackward0":
        other = node._saved_other if slot == 0 else node._saved_self
        return True, _aligned(other.detach(), edge_shape((node, 0)))
    if name == "DivBackward0" and slot == 0:
        return True, _aligned(node._saved_other.detach().reciprocal(), edge_shape((node, 0)))
    return False, None


def fan_of(node: Any) -> int:
    """Multiplications per entry of a node's output."""
    name = node.name()
    if name == "ConvolutionBackward0":
        return int(node._saved_weight[0].numel())
    if name in ("AddmmBackward0", "MmBackward0"):
        return int(node._saved_mat2_sym_sizes[0])
    return int(node._saved_weight.shape[1]) if name == "LinearBackward0" else 4


def move(node: Any, output: int, shape: torch.Size, given: Sequence[Given]) -> Tangent | None:
    """The tangent of one output of a node by a closed rule, or None where there is none."""
    name = node.name()
    if name == "MulBackward0":
        return _product(node, shape, given)
    if len(given) != 1:
        return None
    slot, edge, tangent = given[0]
    if name == "ConvolutionBackward0":
        return _convolution(node, shape, edge, tangent) if slot == 0 else None
    rule = _DENSE.get(name)
    if rule is None:
        return None
    from .pushforward import Tangent

    moved = rule(node, slot, tangent.dense(edge_shape(edge)), shape)
    return None if moved is None else Tangent(moved)


def double_backward(
    node: Any, output: int, shape: torch.Size, parts: Sequence[tuple[int, Tensor]], cache: Cache
) -> Tensor:
    """J u for one node from its own backward: the pullback is recorded once, then differentiated along the
    tangents.
    """
    key = ("pullback", id(node), output)
    if key not in cache:
        with torch.enable_grad():
            meta = node._input_metadata[output]
            seed = torch.zeros(shape, dtype=meta.dtype, device=meta.device, requires_grad=True)
            outputs = len(node._input_metadata)
            pulled = node(*[seed if number == output else None for number in range(outputs)])
            cache[key] = seed, (pulled if isinstance(pulled, tuple) else (pulled,))
    seed, pulled = cache[key]
    count = len(parts[0][1])
    roots, vectors = [], []
    for slot, tangent in parts:
        root = pulled[slot]
        if root is None or not root.requires_grad:
            continue
        with torch.enable_grad():
            root = root.sum_to_size(edge_shape(node.next_functions[slot]))
        roots.append(root)
        vectors.append(tangent.to(root.dtype))
    if not roots:
        return seed.new_zeros(count, *shape)
    with contextlib.suppress(RuntimeError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (found,) = torch.autograd.grad(roots, seed, vectors, retain_graph=True, is_grads_batched=True)
        batched: Tensor = found.detach()
        return batched
    rows = [
        torch.autograd.grad(roots, seed, [v[k] for v in vectors], retain_graph=True)[0] for k in range(count)
    ]
    return torch.stack(rows).detach()


def _convolution(node: Any, shape: torch.Size, edge: Edge, tangent: Tangent) -> Tangent:
    from .pushforward import Tangent

    weight, groups = node._saved_weight.detach(), node._saved_groups
    settled = tangent.settled()
    if settled.band is not None and groups == 1 and not node._saved_transposed:
        value, weight = settled.value, weight[:, settled.band[0] : settled.band[1]]
    else:
        value = settled.dense(edge_shape(edge))
    moved = torch.convolution(
        value.flatten(0, 1), weight, None, node._saved_stride, node._saved_padding, node._saved_dilation,
        node._saved_transposed, node._saved_output_padding, groups,
    )  # fmt: skip
    return Tangent(moved.reshape(len(value), *shape), owned=True)


def _product(node: Any, shape: torch.Size, given: Sequence[Given]) -> Tangent:
    from .pushforward import Tangent

    total: Tensor | None = None
    for slot, edge, tangent in given:
        other = (node._saved_other if slot == 0 else node._saved_self).detach()
        part = _broadcast(tangent.dense(edge_shape(edge)), shape) * other
        total = part if total is None else total + part
    assert total is not None
    return Tangent(total)


def _norm_factor(node: Any) -> Tensor:
    scale = torch.rsqrt(node._saved_running_var + node._saved_eps)
    if node._saved_weight is not None:
        scale = scale * node._saved_weight.detach()
    return scale.reshape(1, -1, *(1,) * (node._saved_input.ndim - 2))


def _scalar(value: float, node: Any) -> Tensor:
    meta = node._input_metadata[0]
    return torch.full((), value, dtype=meta.dtype, device=meta.device)


def _aligned(other: Tensor, shape: torch.Size) -> Tensor:
    return other.reshape(*(1,) * (len(shape) - other.ndim), *other.shape)


def _broadcast(value: Tensor, shape: torch.Size) -> Tensor:
    """[K, *small] -> [K, *1s, *small], which broadcasts against [K, *shape]."""
    return value.reshape(len(value), *(1,) * (len(shape) + 1 - value.ndim), *value.shape[1:])


def _reshape(node: Any, slot: int, value: Tensor, shape: torch.Size) -> Tensor:
    return value.reshape(len(value), *shape)


def _expand(node: Any, slot: int, value: Tensor, shape: torch.Size) -> Tensor:
    return _broadcast(value, shape).expand(len(value), *shape)


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


_DENSE: dict[str, Callable[[Any, int, Tensor, torch.Size], Tensor | None]] = {
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
