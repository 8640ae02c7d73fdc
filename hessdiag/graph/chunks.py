"""Sums over positions and over groups of samples, in chunks that bound the memory they take."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 1 << 26
"""Bytes of per-sample gradients or patches that exist at one time; on a card the least that may."""
LARGEST = 1 << 31
"""The most of them on a card, where each chunk costs a launch of every operation."""
SHARE = 64
"""One part in so many of a card's memory is a chunk, between the two."""


def chunk_bytes(device: torch.device) -> int:
    """Bytes of per-sample gradients or patches that may exist at one time on this device."""
    if device.type != "cuda":
        return CHUNK
    memory: int = torch.cuda.get_device_properties(device).total_memory
    return min(max(memory // SHARE, CHUNK), LARGEST)


def outer(left: Tensor, right: Tensor, group: int) -> Iterator[Tensor]:
    """sum_s left[n, ..., a, s] right[n, ..., b, s], summed over groups of samples, in chunks of samples."""
    samples = len(left)
    each = left[0].numel() // left.shape[-1] * right.shape[-2] * left.element_size()
    step = chunk_samples(each, group, left.device)
    for low in range(0, samples, step):
        a, b = left[low : low + step], right[low : low + step]
        full = len(a) // group * group
        for first, last, size in ((0, full, group), (full, len(a), max(len(a) - full, 1))):
            if first < last:
                yield _joined(a[first:last], size) @ _joined(b[first:last], size).transpose(-1, -2)


def gram_product(x: Tensor, d: Tensor) -> Tensor:
    """X X^T d for every sample, x and d [n, positions, features]: the smaller product first, in chunks of samples."""
    pairs, weights = x.shape[1] ** 2, x.shape[2] * d.shape[2]
    step = chunk_samples(min(pairs, weights) * d.element_size(), 1, d.device)
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


def chunk_samples(bytes_per_sample: int, group: int, device: torch.device) -> int:
    """Samples, in whole groups, that fit into a chunk; one group at least."""
    return max(chunk_bytes(device) // max(bytes_per_sample, 1) // group, 1) * group


def over_pixels(x: Tensor) -> Tensor:
    """[n, channels]: sums over all axes beyond the channels."""
    return x.flatten(2).sum(2) if x.ndim > 2 else x


def spread(per_row: Tensor, fold: int, like: Tensor) -> Tensor:
    """Sums over each sample's `fold` rows, given back to all of them and shaped to meet `like`."""
    if fold > 1:
        per_row = grouped(per_row, fold).repeat_interleave(fold, 0)
    return per_row if per_row.ndim == like.ndim else per_row.reshape(*per_row.shape, *(1,) * (like.ndim - 2))
