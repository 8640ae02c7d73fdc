"""Fully connected networks of any widths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn

from hessdiag.errors import ConfigurationError


class MLP(nn.Module):
    """Linear layers with an activation between any two; `widths=()` is a linear model.

    `squeeze` turns the output [N, 1] of a network with one output into [N].
    """

    def __init__(
        self,
        activation: Callable[[], nn.Module],
        num_classes: int,
        normalize: nn.Module,
        *,
        in_features: int,
        widths: Sequence[int] = (64, 64),
        bias: bool = True,
        squeeze: bool = False,
    ) -> None:
        super().__init__()
        if squeeze and num_classes != 1:
            raise ConfigurationError(f"mlp: squeeze=True needs num_classes=1, got {num_classes}")
        sizes = [in_features, *widths, num_classes]
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(sizes):
            layers += [nn.Linear(fan_in, fan_out, bias=bias), activation()]
        self.normalize = normalize
        self.layers = nn.Sequential(*layers[:-1])
        self.squeeze = squeeze

    def forward(self, x: Tensor) -> Tensor:
        """Logits; inputs of more than two dimensions are flattened."""
        out: Tensor = self.layers(self.normalize(x).flatten(1))
        return out.squeeze(1) if self.squeeze else out
