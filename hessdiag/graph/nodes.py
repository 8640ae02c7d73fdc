"""Names of autograd nodes by what they do: the vocabulary of the allow-list; the order of nodes, and their edges."""

from __future__ import annotations

from typing import Any

import torch

Edge = tuple[Any, int]
"""An output of a node: what autograd knows a tensor of the forward pass by."""
Key = tuple[int, int]

_AFFINE = """
View UnsafeView ReshapeAlias Alias Clone ToCopy Permute Transpose T Mt Squeeze Unsqueeze Expand Repeat Flip Roll
Add Sub Rsub Neg Mul Mean Sum Cumsum Where MaskedFill Index IndexSelect Gather Select Slice Narrow
Cat Stack Split SplitWithSizes UnsafeSplit UnsafeSplitWithSizes Unbind
AvgPool2D AvgPool3D AdaptiveAvgPool2D AdaptiveAvgPool3D MkldnnAdaptiveAvgPool2D
MaxPool2DWithIndices MaxPool3DWithIndices AdaptiveMaxPool2D AdaptiveMaxPool3D Max Amax Maximum Minimum
ConstantPadNd ReflectionPad1D ReflectionPad2D ReflectionPad3D ReplicationPad1D ReplicationPad2D ReplicationPad3D
UpsampleNearest1D UpsampleNearest2D UpsampleNearest3D UpsampleLinear1D UpsampleBilinear2D UpsampleBicubic2D
UpsampleTrilinear3D PixelShuffle PixelUnshuffle ChannelShuffle Unfold Im2Col Col2Im
Threshold Softshrink Hardshrink Copysign
"""
_OVERLOADS = """
Add Sub Rsub Mean Sum Squeeze Max Mul Div Transpose ClampMin Unsqueeze Threshold
"""
AFFINE = (
    frozenset(name + "Backward0" for name in _AFFINE.split())
    | frozenset(name + "Backward1" for name in _OVERLOADS.split())
    | {"SqueezeBackward2"}
)
_INDEXED = """
Embedding Index IndexSelect IndexAdd IndexCopy IndexFill IndexPut Gather Take Scatter ScatterAdd
MaskedFill MaskedScatter Where Expand Repeat
"""
INDEXED = frozenset(name + "Backward0" for name in _INDEXED.split()) | frozenset(
    name + "Backward1" for name in ("MaskedFill", "Scatter", "RepeatInterleave")
)
"""Nodes whose output may hold the samples though all their inputs in the graph do not: numbers, masks, an expansion."""
RANDOM = frozenset({"NativeDropoutBackward0", "FusedDropoutBackward0"})
RANDOM_IN_TRAINING = frozenset({"RreluWithNoiseBackward0", "RreluWithNoiseBackward1"})


def is_leaf(node: Any) -> bool:
    """True for the node that stands for a parameter (AccumulateGrad)."""
    return node is not None and hasattr(node, "variable")


def is_empty(edge: Edge) -> bool:
    """True for a tensor without entries: a batch sent no rows there, and no derivative passes through it."""
    node, number = edge
    return 0 in (node.variable if is_leaf(node) else node._input_metadata[number]).shape


def filled(node: Any) -> list[tuple[int, Edge]]:
    """(input slot, edge) of all that a node is given within the graph and that has entries."""
    return [(slot, edge) for slot, edge in enumerate(node.next_functions) if edge[0] is not None and not is_empty(edge)]


def forward_order(root: Any, *, empty: bool = True) -> list[Any]:
    """All nodes below `root`, every node after those it takes its inputs from; the order is the graph's own.

    Not `empty`, those alone that are reached by tensors with entries.
    """
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
        sources = node.next_functions if empty else [edge for _, edge in filled(node)]
        for source, _ in reversed(sources):
            if source is not None and id(source) not in done:
                stack.append((source, False))
    return order


def graph_bytes(outputs: torch.Tensor) -> int:
    """Bytes of the outputs of all nodes below a tensor: about what autograd keeps of a forward pass."""
    return sum(
        torch.Size(meta.shape).numel() * meta.dtype.itemsize
        for node in forward_order(outputs.grad_fn)
        if not is_leaf(node)
        for meta in node._input_metadata
    )


def edge_shape(edge: Edge) -> torch.Size:
    """Shape of the forward value that an edge of the graph stands for."""
    node, number = edge
    if hasattr(node, "variable"):
        return torch.Size(node.variable.shape)
    return torch.Size(node._input_metadata[number].shape)


def edge_key(edge: Edge) -> Key:
    """The edge as a key of dictionaries."""
    return id(edge[0]), edge[1]


def short_name(node: Any) -> str:
    """The node's operation, without the suffix that autograd gives it."""
    name: str = node.name()
    return name.rstrip("0123456789").removesuffix("Backward") or name


def sizes(node: Any, output: int = 0) -> Any:
    """Shape, dtype and device of one output of a node, or of the parameter that it stands for."""
    return node.variable if is_leaf(node) else node._input_metadata[output]
