"""Random signs keyed by what they belong to, so that neither batching nor sharding changes an estimate.

Signs of a site come from a generator seeded by (seed, replicate, site, block), a block being `BLOCK` consecutive
samples of the whole data. A batch that holds part of a block draws the whole block and keeps its part.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

BLOCK = 16
_MASK = (1 << 64) - 1


def key(*parts: int) -> int:
    """One 63-bit seed from several integers (splitmix64 steps, so that neighbours do not collide)."""
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state = (state ^ (part & _MASK)) & _MASK
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def cpu_generator(seed: int) -> torch.Generator:
    """A seeded generator on the processor, whatever the default device."""
    return torch.Generator(device="cpu").manual_seed(seed & _MASK)


class Signs:
    """Source of Rademacher signs for one measurement on one device."""

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        self.seed = seed
        self.device = torch.device(device)
        self._generator = torch.Generator(device=self.device)

    def plain(self, like: Tensor, *parts: int) -> Tensor:
        """Signs shaped like a tensor, keyed by (seed, *parts)."""
        self._generator.manual_seed(key(self.seed, *parts))
        return self._draw(like.shape, like.dtype)

    def samples(self, shape: torch.Size, start: int, *parts: int, dtype: torch.dtype) -> Tensor:
        """Signs [n, ...] for samples start..start+n-1 of the whole data, keyed by (seed, *parts, block)."""
        count, rest = shape[0], shape[1:]
        first, last = start // BLOCK, (start + count - 1) // BLOCK
        blocks = []
        for block in range(first, last + 1):
            self._generator.manual_seed(key(self.seed, *parts, block))
            rows = BLOCK
            if self.device.type == "cpu":  # draws one number after the other: what comes after the batch is not needed
                rows = min(BLOCK, start + count - block * BLOCK)
            blocks.append(self._draw(torch.Size((rows, *rest)), dtype))
        drawn = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
        offset = start - first * BLOCK
        return drawn[offset : offset + count]

    def _draw(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        if self.device.type != "cpu":
            bits = torch.randint(0, 2, shape, generator=self._generator, device=self.device, dtype=torch.int8)
            return bits.mul_(2).sub_(1).to(dtype)
        size = shape.numel()
        words = torch.empty(-(-size // 64), dtype=torch.int64, device="cpu")
        words.random_(-(1 << 63), None, generator=self._generator)  # all 64 bits
        eights = _signs_of_bytes(dtype).index_select(0, words.view(torch.uint8).int())
        return eights.view(-1)[:size].view(shape)


@cache
def _signs_of_bytes(dtype: torch.dtype) -> Tensor:
    """[256, 8]: by each byte the signs that its bits say. The CPU draws numbers one after the other, so that one serves
    64 signs.
    """
    bits = torch.arange(256, device="cpu").unsqueeze(1) >> torch.arange(8, device="cpu")
    return ((bits & 1) * 2 - 1).to(dtype)
