"""Tangents: what many directions at a time do to one tensor of a forward pass.

They carry the directions as a first axis, [K, *shape of the forward value]. A node that acts elementwise (an
activation, BatchNorm in eval mode, a constant factor) only changes a pending factor common to all directions; a tangent
that lives in a band of channels stays in it until something mixes the channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Band = tuple[int, int]


@dataclass(frozen=True)
class Tangent:
    """`factor * value`, [K, N, ...]; with a band, `value` holds only channels low..high-1.

    `factor` is shaped to broadcast against the whole forward value (without the axis of directions).
    """

    value: Tensor
    factor: Tensor | None = None
    band: Band | None = None
    owned: bool = False  # value is this pass's own and may be overwritten by whoever uses it last

    def narrowed(self, whole: Tensor) -> Tensor:
        """The part of a tensor shaped like the forward value that belongs to the band."""
        if self.band is None or whole.ndim < 2 or whole.shape[1] == 1:
            return whole
        return whole[:, self.band[0] : self.band[1]]

    def scaled(self, factor: Tensor) -> Tangent:
        """Multiply by a factor that all directions share."""
        return Tangent(self.value, factor if self.factor is None else self.factor * factor, self.band, self.owned)

    def settled(self, *, last: bool = False) -> Tangent:
        """The same tangent without a pending factor; computed in place where nobody else needs the value (`last`)."""
        if self.factor is None:
            return self
        factor = self.narrowed(self.factor)
        value = self.value.mul_(factor) if last and self.owned else self.value * factor
        return Tangent(value, None, self.band, True)

    def dense(self, shape: Sequence[int]) -> Tensor:
        """[K, *shape]: every channel, no pending factor."""
        value = self.settled().value
        if self.band is None:
            return value
        whole = value.new_zeros(len(value), *shape)
        whole[:, :, self.band[0] : self.band[1]] = value
        return whole


def broadcast(value: Tensor, shape: torch.Size) -> Tensor:
    """[K, *small] -> [K, *1s, *small], which broadcasts against [K, *shape]."""
    return value.reshape(len(value), *(1,) * (len(shape) + 1 - value.ndim), *value.shape[1:])


def aligned(other: Tensor, shape: torch.Size) -> Tensor:
    """A tensor that broadcasts against `shape`, with as many axes."""
    return other.reshape((1,) * (len(shape) - other.ndim) + tuple(other.shape))
