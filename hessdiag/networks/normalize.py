"""Input normalisation as a layer without parameters: attacks and checkpoints see raw inputs in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hessdiag.errors import ConfigurationError

Statistics = tuple[Sequence[float], Sequence[float]]


class Normalize(nn.Module):
    """(x - mean)/std along dimension 1. The statistics are configuration: no state-dict key is theirs."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        mean, std = [float(m) for m in mean], [float(s) for s in std]
        if len(mean) != len(std) or not mean:
            raise ConfigurationError(
                f"normalize: {len(mean)} means and {len(std)} deviations; give one of each per channel"
            )
        if not all(math.isfinite(v) for v in mean) or not all(math.isfinite(s) and s > 0 for s in std):
            raise ConfigurationError("normalize: means must be finite, deviations finite and positive")
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """The normalised input."""
        shape = (1, -1, *[1] * (x.ndim - 2))
        return (x - self.mean.view(shape)) / self.std.view(shape)

    def extra_repr(self) -> str:
        """Shown by `print(module)`."""
        return f"mean={self.mean.tolist()}, std={self.std.tolist()}"


def layer(normalize: Statistics | None) -> nn.Module:
    """The layer for (mean, std), or the identity."""
    if normalize is None:
        return nn.Identity()
    try:
        mean, std = normalize
        return Normalize(mean, std)
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(
            "normalize must be None or a pair (mean, std) of sequences, one number per channel"
        ) from None
