"""Adversarial weight perturbation (Wu, Xia & Wang 2020, arXiv 2004.05884), for any method.

For each weight tensor w of more than one dimension, with g the gradient of the training loss on the crafted batch,

    delta = gamma ||w|| g / (||g|| + 1e-20),

so that ||delta|| = gamma ||w||. Loss and gradient are then taken at w + delta, and the step is applied to w.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def perturbed_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Convolution and linear weights: more than one dimension and "weight" in the name; no BatchNorm, no bias."""
    return [p for name, p in model.named_parameters() if p.ndim > 1 and "weight" in name and p.requires_grad]


def perturbation(parameters: Sequence[Tensor], gradients: Sequence[Tensor], gamma: float) -> list[Tensor]:
    """The deltas, one per tensor."""
    weight_norms = torch._foreach_norm([p.detach() for p in parameters])
    gradient_norms = torch._foreach_norm(list(gradients))
    return [
        gradient * (gamma * length / (slope + 1e-20))
        for gradient, length, slope in zip(gradients, weight_norms, gradient_norms)
    ]


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Running statistics as they were, whatever passes were made in between."""
    buffers = [buffer for buffer in model.buffers() if buffer is not None]
    saved = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, saved):
                buffer.copy_(value)


def ascent(
    model: nn.Module, parameters: Sequence[nn.Parameter], gamma: float, loss: Callable[[], Tensor]
) -> list[Tensor]:
    """Deltas from the gradient of `loss()`, whose passes leave the running statistics untouched.

    The public code takes g from a copy of the model with an optimiser of its own; its learning rate cancels in the
    normalisation, so neither is needed.
    """
    with buffers_kept(model):
        gradients = torch.autograd.grad(loss(), list(parameters))
    return perturbation(parameters, gradients, gamma)


class Perturbed:
    """Weights moved by deltas, and put back to the bit.

    `restore` copies the old values back and, since the public code applies weight decay to w + delta, adds
    decay·delta to each gradient: the step that follows is then the same as one at the perturbed weights.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], deltas: Sequence[Tensor]) -> None:
        self.parameters: list[Tensor] = list(parameters)
        self.deltas = list(deltas)
        with torch.no_grad():
            self.saved = [parameter.clone() for parameter in self.parameters]
            torch._foreach_add_(self.parameters, self.deltas)

    def restore(self, decays: Sequence[float]) -> None:
        """Old values back; gradients gain what weight decay at the perturbed weights would have added."""
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.saved)
            for parameter, delta, decay in zip(self.parameters, self.deltas, decays):
                if parameter.grad is not None and decay:
                    parameter.grad.add_(delta, alpha=decay)
