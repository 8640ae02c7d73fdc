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
        self.in_order = self.device.type == "cpu"
        """Whether it draws one number after the other, so that what comes after a batch need not be drawn."""

    def plain(self, like: Tensor, *parts: int) -> Tensor:
        """Signs shaped like a tensor, keyed by (seed, *parts)."""
        self._generator.manual_seed(key(self.seed, *parts))
        return self._draw(like.shape, like.dtype)

    def samples(self, shape: torch.Size, start: int, *parts: int, dtype: torch.dtype) -> Tensor:
        """Signs [n, ...] for samples start..start+n-1 of the whole data, keyed by (seed, *parts, block)."""
        count, rest = shape[0], shape[1:]
        blocks = []
        for block in range(start // BLOCK, (start + count - 1) // BLOCK + 1):
            self._generator.manual_seed(key(self.seed, *parts, block))
            first = block * BLOCK
            blocks.append(self._rows(max(start - first, 0), min(start + count - first, BLOCK), rest, dtype))
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)

    def _rows(self, low: int, high: int, rest: torch.Size, dtype: torch.dtype) -> Tensor:
        """Signs of the samples low..high-1 of a block."""
        if self.in_order:
            return self._draw(torch.Size((high, *rest)), dtype)[low:]
        words = self._words(BLOCK * -(-rest.numel() // 64)).view(BLOCK, -1)  # a whole number of them for each sample
        return self._signs(words[low:high], dtype)[:, : rest.numel()].reshape(high - low, *rest)

    def _draw(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        size = shape.numel()
        return self._signs(self._words(-(-size // 64)), dtype)[:size].view(shape)

    def _words(self, count: int) -> Tensor:
        """Random numbers of 64 bits."""
        words = torch.empty(count, dtype=torch.int64, device=self.device)
        return words.random_(-(1 << 63), None, generator=self._generator)

    def _signs(self, words: Tensor, dtype: torch.dtype) -> Tensor:
        """The signs that their bits say, 64 of each."""
        table, numbers = _signs_of_bytes(dtype, self.device), words.reshape(-1).view(torch.uint8).int()
        if dtype == torch.int8:  # eight of them are one number to move
            return table.view(torch.int64)[:, 0].index_select(0, numbers).view(dtype).view(*words.shape[:-1], -1)
        return table.index_select(0, numbers).view(*words.shape[:-1], -1)


@cache
def _signs_of_bytes(dtype: torch.dtype, device: torch.device) -> Tensor:
    """[256, 8]: by each byte the signs that its bits say, eight for what drawing one takes."""
    bits = torch.arange(256, device="cpu").unsqueeze(1) >> torch.arange(8, device="cpu")
    return ((bits & 1) * 2 - 1).to(device, dtype)
