"""Running sums of Hessian diagonals in float64, split into their Gauss-Newton and functional parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


def zeros(like: Mapping[str, Tensor]) -> Tensors:
    """One float64 zero tensor per parameter."""
    return {name: torch.zeros(p.shape, dtype=torch.float64, device=p.device) for name, p in like.items()}


def accumulate(into: Tensors, parts: Mapping[str, Tensor], scale: float = 1.0) -> None:
    """Into += scale * parts, name by name."""
    for name, part in parts.items():
        into[name].add_(part.detach(), alpha=scale)


def accumulate_new(into: Tensors, parts: Mapping[str, Tensor], scale: float = 1.0) -> None:
    """`accumulate`, what is missing being zero."""
    into |= zeros({name: part for name, part in parts.items() if name not in into})
    accumulate(into, parts, scale)


@cache
def hold_freed_memory() -> None:
    """Have glibc keep freed blocks of up to 32 MB for the next, once in a process.

    It gives larger ones than it has seen freed back to the system, which then hands out the next page by page, each
    zeroed: half the time of an audit. One such block, made and freed untouched, is what it goes by from then on.
    """
    torch.empty((32 << 20) - (1 << 12), dtype=torch.uint8, device="cpu")


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was told: a clock tells nothing before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Parts:
    """Sums over samples (not yet divided by the weight of the data): total = gauss_newton + functional."""

    gauss_newton: Tensors
    functional: Tensors
    weight: float = 0.0
    samples: int = 0
    notes: list[str] = field(default_factory=list)

    @classmethod
    def like(cls, parameters: Mapping[str, Tensor]) -> Parts:
        """Zero sums."""
        return cls(zeros(parameters), zeros(parameters))
