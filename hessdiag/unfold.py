"""Unfolding: what each output position of a convolution sees, and sums over positions in chunks of samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .errors import UncoveredModelError

CHUNK = 1 << 26
"""Bytes of per-sample gradients or patches that exist at one time."""


def matrix_input(node: Any) -> Tensor:
    """What a linear layer was given, from what its node saved."""
    for attribute in ("_saved_mat1", "_saved_self", "_saved_input"):
        saved = getattr(node, attribute, None)
        if isinstance(saved, Tensor):
            return saved.detach()
    raise UncoveredModelError(f"{node.name()} did not save its input; is the weight's gradient needed?")


def patches(x: Tensor, node: Any, kernel: torch.Size, groups: int) -> Tensor:
    """[n, groups, C/groups * kernel, positions]: what each output position of a convolution sees, for any dimension."""
    kernel = kernel[2:]
    dims = len(kernel)
    stride, padding, dilation = (
        _per_axis(getattr(node, f"_saved_{k}"), dims) for k in ("stride", "padding", "dilation")
    )
    if any(padding):
        x = torch.nn.functional.pad(x, [p for axis in reversed(range(dims)) for p in (padding[axis],) * 2])
    x = x.contiguous()
    out = [(x.shape[2 + i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(dims)]
    base = x.stride()
    view = x.as_strided(
        (*x.shape[:2], *kernel, *out),
        (
            *base[:2],
            *(base[2 + i] * dilation[i] for i in range(dims)),
            *(base[2 + i] * stride[i] for i in range(dims)),
        ),
    )
    positions = 1
    for size in out:
        positions *= size
    return view.reshape(len(x), groups, -1, positions)


def _per_axis(value: Any, dims: int) -> tuple[int, ...]:
    values = tuple(int(v) for v in value)
    return values if len(values) == dims else values * dims


def outer(left: Tensor, right: Tensor, group: int) -> Iterator[Tensor]:
    """sum_s left[n, ..., a, s] right[n, ..., b, s], summed over groups of samples, in chunks of samples."""
    samples = len(left)
    step = chunk_samples(left[0].numel() // left.shape[-1] * right.shape[-2] * left.element_size(), group)
    for low in range(0, samples, step):
        a, b = left[low : low + step], right[low : low + step]
        full = len(a) // group * group
        for first, last, size in ((0, full, group), (full, len(a), max(len(a) - full, 1))):
            if first < last:
                yield _joined(a[first:last], size) @ _joined(b[first:last], size).transpose(-1, -2)


def gram_product(x: Tensor, d: Tensor) -> Tensor:
    """X X^T d for every sample, x and d [n, positions, features]: the smaller product first, in chunks of samples."""
    pairs, weights = x.shape[1] ** 2, x.shape[2] * d.shape[2]
    step = chunk_samples(min(pairs, weights) * d.element_size(), 1)
    parts = []
    for low in range(0, len(x), step):
        a, b = x[low : low + step], d[low : low + step]
        turned = a.transpose(1, 2)
        parts.append((a @ turned) @ b if pairs <= weights else a @ (turned @ b))
    return torch.cat(parts)


def _joined(x: Tensor, group: int) -> Tensor:
    """Neighbouring samples become further positions: [n, ..., a, s] -> [n/group, ..., a, group * s]."""
    if group == 1:
        return x
    return x.reshape(-1, group, *x.shape[1:]).movedim(1, -2).flatten(-2)


def grouped(x: Tensor, group: int) -> Tensor:
    """Sums over groups of neighbouring samples (the last group may be smaller); a new tensor."""
    if group == 1:
        return x.clone()
    full = len(x) // group * group
    parts = [x[:full].reshape(-1, group, *x.shape[1:]).sum(1)] if full else []
    if full < len(x):
        parts.append(x[full:].sum(0, keepdim=True))
    return torch.cat(parts)


def chunk_samples(bytes_per_sample: int, group: int) -> int:
    """Samples, in whole groups, that fit into `CHUNK` bytes; one group at least."""
    return max(CHUNK // max(bytes_per_sample, 1) // group, 1) * group
