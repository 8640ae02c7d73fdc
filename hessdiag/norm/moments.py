"""Second moments of grouped replicates: the few numbers per tensor from which every norm is computed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hessdiag.errors import ConfigurationError
from hessdiag.graph.chunks import chunk_bytes
from hessdiag.norm.jackknife import Array

CHUNK = 1 << 16
"""Entries handled at once where float64 copies of values are needed: a processor finds them in its cache."""
COPIES = 3
"""Numbers in float64 that are made of each entry."""


def chunk(device: torch.device, groups: int = 1) -> int:
    """Entries handled at once, each in so many groups; more on a card, where each part costs a launch of everything."""
    return max(CHUNK, chunk_bytes(device) // (8 * COPIES * groups)) if device.type == "cuda" else CHUNK


@dataclass(frozen=True)
class Moments:
    """What the norm of a set of entries needs of the replicates; moments of disjoint sets add."""

    gram: Array
    """Products of the group sums, [groups, groups]."""
    own: Array
    """Summed squared norms of the replicates of each group."""
    sizes: tuple[int, ...]
    """Replicates in each group."""
    fourth: float
    """Unbiased estimate of sum d^4, from four disjoint quarters of the groups; NaN below four in use."""
    entries: int
    """Number of entries, p."""

    def first(self, groups: int) -> Moments:
        """What there was when only the first so many groups had replicates; sums of fourth powers are not kept."""
        sizes = self.sizes[:groups] + (0,) * (len(self.sizes) - groups)
        return Moments(self.gram, self.own, sizes, float("nan"), self.entries)

    def __add__(self, other: Moments) -> Moments:
        if self.sizes != other.sizes:
            sizes = f"{self.sizes} and {other.sizes}"
            raise ConfigurationError(f"moments of different replicates do not add: groups of {sizes}")
        fourth, entries = self.fourth + other.fourth, self.entries + other.entries
        return Moments(self.gram + other.gram, self.own + other.own, self.sizes, fourth, entries)


def tensor_moments(
    sums: Tensor, own: Tensor, counts: Tensor, parts: Tensor, *, weight: Tensor | None, offset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gram matrix, own products and sum of fourth powers of `w * (g + d)` from the group sums of `d`.

    With an exactly known g (and w = 1) the group sums become F + n g and the own products
    sum |g + d_i|^2 = n |g|^2 + 2 g.F + sum |d_i|^2. `own` holds the products already weighted.
    """
    own = own.clone()
    gram, fourth = sums.new_zeros(sums.shape[0], sums.shape[0]), sums.new_zeros(())
    step = chunk(sums.device, len(sums))
    for start in range(0, sums.shape[1], step):
        values = sums[:, start : start + step]
        scale = None if weight is None else weight.reshape(-1)[start : start + step].to(sums)
        if scale is not None:
            values = values * scale
        if offset is not None:
            known = offset.reshape(-1)[start : start + step].to(sums)
            if scale is not None:
                known = known * scale
            own += counts * known.dot(known) + 2.0 * (values @ known)
            values = values + counts[:, None] * known
        gram += values @ values.T
        fourth = fourth + (parts @ values).prod(0).sum()
    return gram, own, fourth


def quarters(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """[4, groups] weights that turn group sums into means over four sets of groups; NaN below 4."""
    used = [g for g, n in enumerate(sizes) if n]
    weights = np.zeros((4, len(sizes)))
    for position, group in enumerate(used):
        weights[position % 4, group] = 1.0
    held = weights @ np.array(sizes, dtype=np.float64)
    weights = weights / held[:, None] if len(used) >= 4 else np.full_like(weights, np.nan)
    return torch.tensor(weights, device=device)
