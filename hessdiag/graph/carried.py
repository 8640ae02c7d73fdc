"""A parameter on its way to the node that applies it: viewed, turned, expanded, picked from, scaled, shifted.

All of these give w = a theta[index] + constant, every entry of w from one entry of theta: gradients of w are gradients
of theta, added up where an entry serves more than once. `index` and `a` are read off a few tangents moved through the
nodes between; what mixes entries of theta fails a comparison with one more, and is no such way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hessdiag.graph.pullback import random_like

DIGIT = 1024
"""Entries are numbered in this base, one tangent a digit: float32 tells so many apart after any scaling."""
SAME = {torch.float64: 1e-12, torch.float32: 1e-5}


@dataclass(frozen=True)
class Carried:
    """w, of `shape`, that the input `slot` of a node is given, as a function of the parameter `name` of shape `own`."""

    name: str
    slot: int
    own: torch.Size
    shape: torch.Size
    index: Tensor | None = None
    """Shaped like w; None where w is theta in another shape."""
    factor: Tensor | None = None
    """a, shaped like w; None for 1."""

    def pull(self, rows: Tensor, *, own_rows: bool, power: int = 1) -> Tensor:
        """[n, *own]: the sums of a^power times what reaches w, row by row.

        With `own_rows` the first axis of w is that of the n rows; otherwise all of w serves each row.
        """
        if self.factor is not None:
            rows = rows.reshape(len(rows), -1) * self._by_rows(self.factor.to(rows.dtype), own_rows) ** power
        if self.index is not None:
            flat = rows.reshape(len(rows), -1)
            index = self._by_rows(self.index, own_rows).expand_as(flat)
            rows = flat.new_zeros(len(rows), self.own.numel()).scatter_add(1, index, flat)
        return rows.reshape(len(rows), *self.own)

    def push(self, steps: Tensor, *, own_rows: bool) -> Tensor:
        """[n, entries of w that serve a row] for steps [n, *own] of theta."""
        steps = steps.reshape(len(steps), -1)
        if self.index is not None:
            index = self._by_rows(self.index, own_rows)
            steps = steps.gather(1, index.expand(len(steps), -1))
        return steps if self.factor is None else steps * self._by_rows(self.factor.to(steps.dtype), own_rows)

    def units(self, low: int, high: int, like: Tensor) -> Tensor:
        """[high - low, *w]: the change of w along single entries of theta."""
        index = self.index
        if index is None:
            index = torch.arange(self.own.numel(), device=like.device).reshape(self.shape)
        entries = torch.arange(low, high, device=like.device).reshape(-1, *(1,) * len(self.shape))
        units = (index == entries).to(like.dtype)
        return units if self.factor is None else units * self.factor.to(like.dtype)

    def _by_rows(self, values: Tensor, own_rows: bool) -> Tensor:
        return values.reshape(values.shape[0] if own_rows else 1, -1)


def read(
    moved: Callable[[Tensor], Tensor], own: torch.Size, like: Tensor
) -> tuple[Tensor | None, Tensor | None] | None:
    """(index, a) of a linear map [K, *own] -> [K, *w] of tangents; None where it is no such map."""
    size = max(own.numel(), 1)
    entries = torch.arange(size, device=like.device)
    digits = [entries // DIGIT**k % DIGIT for k in range(max(-(-(size - 1).bit_length() // 10), 1))]
    probe = random_like(torch.Size((size,)), like.dtype, like.device, 3)
    tangents = torch.stack([torch.ones(size, device=like.device), *digits, probe]).to(like.dtype)
    found = moved(tangents.reshape(-1, *own))
    factor, seen = found[0], found[-1]
    if factor.is_complex():  # an entry of two numbers, or one that turns
        return None
    safe = torch.where(factor == 0, 1.0, factor)
    index = torch.zeros(factor.shape, dtype=torch.long, device=like.device)
    for k, digit in enumerate(found[1:-1]):
        index += torch.where(factor == 0, 0.0, digit / safe).round().clamp(0, DIGIT - 1).long() * DIGIT**k
    index.clamp_(max=size - 1)
    again = factor * probe[index]
    if not bool(((again - seen).abs() <= SAME[like.dtype] * torch.maximum(again.abs(), seen.abs())).all()):
        return None
    plain = factor.numel() == size and torch.equal(index.reshape(-1), entries)
    return (None if plain else index), (None if bool((factor == 1).all()) else factor)
