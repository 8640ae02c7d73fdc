"""Tensors that do not hold every entry: of a model's buffers what they hold, of a batch what to give instead.

A sparse buffer, as a graph's adjacency, is a constant like any other: its products are nodes that the graph shows. A
batch is cut by samples, and each of these told from the others by its entries, for which it must be dense.
"""

from __future__ import annotations

import torch
from torch import Tensor


def is_dense(tensor: Tensor) -> bool:
    """Whether it holds every entry, in one place of memory."""
    return not tensor.is_nested and tensor.layout == torch.strided


def stored(tensor: Tensor) -> tuple[Tensor, ...]:
    """The dense tensors that it consists of, that of its values first; itself if it is dense."""
    if tensor.layout == torch.sparse_coo:
        return tensor._values(), tensor._indices()
    return (tensor,) if is_dense(tensor) else (tensor.values(),)


def unchanged(tensor: Tensor, before: Tensor) -> bool:
    """Whether it holds what its copy `before` does."""
    return all(map(torch.equal, stored(tensor), stored(before)))


def instead_of(tensor: Tensor) -> str:
    """What it is, and what a batch can hold in its place."""
    if tensor.is_nested:
        return "nested tensor, of samples of unequal lengths: pad them to one (torch.nested.to_padded_tensor)"
    return (
        f"sparse tensor ({tensor.layout}), and samples are cut from dense ones: use .to_dense(), and keep what serves "
        "all samples (a graph) in the model, as a buffer, where it may be sparse"
    )
