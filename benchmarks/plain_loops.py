"""Training loops as one writes them first, eager and uncached: what the trainer is timed against.

Each function makes one optimiser step of a method on a batch that already lies augmented on the device, which favours
these loops: loading and augmenting are not timed here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPS, STEP = 8 / 255, 2 / 255
Views = tuple[Tensor, ...]
PlainStep = Callable[[nn.Module, torch.optim.Optimizer, Views, Tensor], None]


def ascend(
    forward: Callable[[Tensor], Tensor],
    x: Tensor,
    start: Tensor,
    loss: Callable[[Tensor], Tensor],
    steps: int,
    size: float,
) -> Tensor:
    """Projected sign ascent; the gradient is asked for the images alone, as the public code of TRADES does."""
    point = start
    for _ in range(steps):
        point = point.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(forward(point)), point)
        point = torch.min(torch.max(point + size * gradient.sign(), x - EPS), x + EPS).clamp(0, 1)
    return point.detach()


def _finish(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
    optimiser.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimiser.step()


def standard(model: nn.Module, optimiser: torch.optim.Optimizer, views: Views, y: Tensor) -> None:
    """Cross-entropy."""
    _finish(optimiser, F.cross_entropy(model(views[0]), y))


def n_fgsm(model: nn.Module, optimiser: torch.optim.Optimizer, views: Views, y: Tensor) -> None:
    """Noise, one gradient, one step; BatchNorm trains throughout."""
    x = views[0]
    start = (x + torch.empty_like(x).uniform_(-2 * EPS, 2 * EPS)).clamp(0, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(start), y), start)
    point = (start + EPS * gradient.sign()).clamp(0, 1).detach()
    _finish(optimiser, F.cross_entropy(model(point), y))


def pgd_at(model: nn.Module, optimiser: torch.optim.Optimizer, views: Views, y: Tensor) -> None:
    """PGD-10 with BatchNorm in training mode."""
    x = views[0]
    start = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)
    point = ascend(model, x, start, lambda z: F.cross_entropy(z, y), 10, STEP)
    _finish(optimiser, F.cross_entropy(model(point), y))


def _kl(f: Tensor, g: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(g, 1), F.softmax(f, 1), reduction="sum")


def _trades_images(forward: Callable[[Tensor], Tensor], x: Tensor, steps: int, size: float) -> Tensor:
    """The clean logits computed anew in every step."""
    start = x + 0.001 * torch.randn_like(x)
    return ascend(forward, x, start, lambda z: _kl(forward(x).detach(), z), steps, size)


def trades(model: nn.Module, optimiser: torch.optim.Optimizer, views: Views, y: Tensor) -> None:
    """TRADES-10: attack in eval mode, then three passes in training mode."""
    x = views[0]
    model.eval()
    point = _trades_images(model, x, 10, STEP)
    model.train()
    loss = F.cross_entropy(model(x), y) + 6.0 * _kl(model(x), model(point)) / len(x)
    _finish(optimiser, loss)


def dajat(model: nn.Module, optimiser: torch.optim.Optimizer, views: Views, y: Tensor) -> None:
    """Three views, five steps each, without weight perturbation; `model` is a `SplitNorm`."""
    model.eval()
    norms = ("base", "auto", "auto")
    crafted = []
    for x, norm in zip(views, norms):

        def forward(z: Tensor, norm: str = norm) -> Tensor:
            logits: Tensor = model(z, norm)
            return logits

        crafted.append(_trades_images(forward, x, 5, EPS / 2))
    model.train()
    parts, clean = [], []
    for x, point, norm in zip(views, crafted, norms):
        f, g = model(x, norm), model(point, norm)
        clean.append(F.softmax(f, 1))
        parts.append(F.cross_entropy(f, y) + 11.0 * _kl(f, g) / len(x))
    mixture = (sum(clean[1:], clean[0]) / 3).clamp(1e-7, 1).log()
    divergences = [F.kl_div(mixture, p, reduction="batchmean") for p in clean]
    _finish(optimiser, sum(parts[1:], parts[0]) / 3 + 2.0 * sum(divergences[1:], divergences[0]) / 3)


STEPS: dict[str, PlainStep] = {
    "standard": standard,
    "n_fgsm": n_fgsm,
    "pgd_at": pgd_at,
    "trades": trades,
    "dajat": dajat,
}
