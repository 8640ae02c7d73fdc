"""How single nodes of an autograd graph move tangents forward: closed rules for common kinds, double backward
else.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..sites import edge_shape
from ..sites.elementwise import derivatives, is_elementwise
from ..sites.graph import Edge
from ..sites.nodes import BATCH_NORM, constant
from .denserules import DENSE, broadcast

if TYPE_CHECKING:
    from .pushforward import Tangent

Given = tuple[int, Edge, "Tangent"]
Cache = dict[tuple[str, int, int], Any]

_SAME = frozenset({"AliasBackward0", "CloneBackward0", "AddBackward1", "SubBackward1"})


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
    if name == "MulBackward0" or (name == "DivBackward0" and slot == 0):
        return True, _aligned(constant(node, slot), edge_shape((node, 0)))
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
    rule = DENSE.get(name)
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
        return torch.zeros(count, *shape, dtype=seed.dtype, device=seed.device)
    with contextlib.suppress(RuntimeError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = torch.autograd.grad(roots, seed, vectors, retain_graph=True, is_grads_batched=True)[0]
        batched: Tensor = found.detach()
        return batched
    rows = [torch.autograd.grad(roots, seed, [v[k] for v in vectors], retain_graph=True)[0] for k in range(count)]
    return torch.stack(rows).detach()


def _convolution(node: Any, shape: torch.Size, edge: Edge, tangent: Tangent) -> Tangent:
    from .pushforward import Tangent

    weight, groups = node._saved_weight.detach(), node._saved_groups
    settled = tangent.settled()
    if settled.band is not None and groups == 1 and not node._saved_transposed:
        value, weight = settled.value, weight[:, settled.band[0] : settled.band[1]]
    else:
        value = settled.dense(edge_shape(edge))
    images, stride = value.flatten(0, 1), node._saved_stride
    if not node._saved_transposed and weight[0, 0].numel() == 1 and not any(node._saved_padding):
        # a strided convolution of one pixel picks pixels; the libraries' own kernels for it can be ten times slower
        images = images[(slice(None), slice(None), *(slice(None, None, step) for step in stride))].contiguous()
        stride = (1,) * len(stride)
    moved = torch.convolution(
        images,
        weight,
        None,
        stride,
        node._saved_padding,
        node._saved_dilation,
        node._saved_transposed,
        node._saved_output_padding,
        groups,
    )
    return Tangent(moved.reshape(len(value), *shape), owned=True)


def _product(node: Any, shape: torch.Size, given: Sequence[Given]) -> Tangent:
    from .pushforward import Tangent

    total: Tensor | None = None
    for slot, edge, tangent in given:
        part = broadcast(tangent.dense(edge_shape(edge)), shape) * constant(node, slot)
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
