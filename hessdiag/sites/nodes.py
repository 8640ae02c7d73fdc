"""Names of autograd nodes by what they do: the vocabulary of the allow-list; the order of nodes, and their edges."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import UncoveredModelError

Key = tuple[int, int]

_AFFINE = """
View UnsafeView ReshapeAlias Alias Clone ToCopy Permute Transpose T Mt Squeeze Unsqueeze Expand Repeat Flip Roll
Add Sub Rsub Neg Mean Sum Cumsum Where MaskedFill Index IndexSelect Gather Select Slice Narrow
Cat Stack Split SplitWithSizes UnsafeSplit UnsafeSplitWithSizes Unbind
AvgPool2D AvgPool3D AdaptiveAvgPool2D AdaptiveAvgPool3D MkldnnAdaptiveAvgPool2D
MaxPool2DWithIndices MaxPool3DWithIndices AdaptiveMaxPool2D AdaptiveMaxPool3D Max Amax Maximum Minimum
ConstantPadNd ReflectionPad1D ReflectionPad2D ReflectionPad3D ReplicationPad1D ReplicationPad2D ReplicationPad3D
UpsampleNearest1D UpsampleNearest2D UpsampleNearest3D UpsampleLinear1D UpsampleBilinear2D UpsampleBicubic2D
UpsampleTrilinear3D PixelShuffle PixelUnshuffle ChannelShuffle Unfold Im2Col Col2Im
Threshold Softshrink Hardshrink
"""
_OVERLOADS = """
Add Sub Rsub Mean Sum Squeeze Max Mul Div Transpose ClampMin Unsqueeze Threshold
"""
AFFINE = (
    frozenset(name + "Backward0" for name in _AFFINE.split())
    | frozenset(name + "Backward1" for name in _OVERLOADS.split())
    | {"SqueezeBackward2"}
)
BATCH_NORM = frozenset({"NativeBatchNormBackward0", "CudnnBatchNormBackward0", "MiopenBatchNormBackward0"})
MATRIX = frozenset({"AddmmBackward0", "MmBackward0", "LinearBackward0"})
PRODUCTS = frozenset({"MulBackward0"})
RANDOM = frozenset({"NativeDropoutBackward0", "FusedDropoutBackward0"})
TURNED = frozenset({"TBackward0", "TransposeBackward0", "PermuteBackward0"})


def is_leaf(node: Any) -> bool:
    """True for the node that stands for a parameter (AccumulateGrad)."""
    return node is not None and hasattr(node, "variable")


def forward_order(root: Any) -> list[Any]:
    """All nodes below `root`, every node after those it takes its inputs from; the order is the graph's own."""
    order: list[Any] = []
    done: set[int] = set()
    stack: list[tuple[Any, bool]] = [(root, False)] if root is not None else []
    while stack:
        node, expanded = stack.pop()
        if expanded:
            order.append(node)
            continue
        if id(node) in done:
            continue
        done.add(id(node))
        stack.append((node, True))
        for source, _ in reversed(node.next_functions):
            if source is not None and id(source) not in done:
                stack.append((source, False))
    return order


def edge_shape(edge: tuple[Any, int]) -> torch.Size:
    """Shape of the forward value that an edge of the graph stands for."""
    node, number = edge
    if hasattr(node, "variable"):
        return torch.Size(node.variable.shape)
    return torch.Size(node._input_metadata[number].shape)


def constant(node: Any, slot: int) -> Tensor:
    """What a product or a quotient multiplies its input `slot` by, in the dtype of its output.

    A Python number is saved as a float64 tensor that torch still takes for a number: what is computed from it falls to
    the default dtype, and what it meets as a tensor of no axes is lifted to float64. Neither is left of it here.
    """
    quotient = node.name().startswith("Div")
    saved = node._saved_self if slot == 1 else node._saved_other
    if saved is None:
        raise UncoveredModelError(f"{node.name()} did not save its other factor; is a gradient of it needed?")
    value: Tensor = torch.empty_like(saved, dtype=node._input_metadata[0].dtype).copy_(saved.detach())
    return value.reciprocal_() if quotient else value


def edge_key(edge: tuple[Any, int]) -> Key:
    """The edge as a key of dictionaries."""
    return id(edge[0]), edge[1]
