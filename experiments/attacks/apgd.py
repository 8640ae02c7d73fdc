"""Auto-PGD in Linf, from its publication (Croce & Hein 2020, arXiv 2003.01690, algorithm 1).

Start x_0 = x + eps u / max|u|, u ~ U(-1, 1), in the box; step size 2 eps per sample, then per iteration

    z = Pi(x_k + eta sign g),    x_{k+1} = Pi(x_k + a (z - x_k) + (1 - a)(x_k - x_{k-1})),    a = 0.75,
    first 1

At the checkpoints (the first after 22% of the steps; the gaps shrink by 3% down to 6%) a sample halves its
eta and goes back to its best point if at most rho = 75% of the steps since the last checkpoint raised its
loss, or if its eta was kept there and its best loss has not moved since.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hessdiag.ascent import (
    AttackLoss,
    Forward,
    ascend_linf,
    handed_back,
    input_gradient,
    project_linf,
    refuse_non_finite,
)
from hessdiag.errors import ConfigurationError
from hessdiag.perturbation import cross_entropy

from .inputs import check_dlr, check_labels, check_samples, plain_radius
from .losses import dlr_targeted
from .pgd import logits_function, plain_logits, uniform_noise

MOMENTUM = 0.75
RHO = 0.75
STEPS = 100
TARGETS = 9
Noise = Callable[[int], Tensor]


@dataclass(frozen=True)
class APGDRun:
    """One run from one start, per sample: was an iterate misclassified, the last such, the highest loss."""

    fooled: Tensor
    last: Tensor
    best: Tensor
    best_loss: Tensor
    flat: Tensor
    finite: Tensor


@dataclass(frozen=True)
class APGDResult:
    """`x_adv` is misclassified where `clean` and not `robust`, else clean; `x_best` has the highest loss met.

    `flat` counts runs that began at a zero gradient, where a gradient attack can tell nothing.
    """

    clean: Tensor
    robust: Tensor
    x_adv: Tensor
    x_best: Tensor
    flat: int


def checkpoints(steps: int) -> dict[int, int]:
    """After how many iterations a sample's step size is judged, and how many iterations that looks back."""
    gap, least, shrink = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
    found, position = {}, gap
    while position <= steps:
        found[position] = gap
        gap = max(gap - shrink, least)
        position += gap
    return found


def apgd(
    forward: Forward,
    x: Tensor,
    start: Tensor,
    labels: Tensor,
    target: Any,
    *,
    eps: float,
    steps: int,
    loss: AttackLoss,
    rho: float = RHO,
    autocast: torch.dtype | None = None,
) -> APGDRun:
    """One run of `steps` iterations on every sample given: tensor operations only, no branch on data."""
    points, previous = start, start
    values, gradient, logits = input_gradient(forward, points, target, loss, autocast)
    finite = values.isfinite() & gradient.flatten(1).isfinite().all(1)
    flat = (gradient.flatten(1) == 0).all(1)
    fooled, last = logits.argmax(1) != labels, points
    best, best_gradient, best_loss = points, gradient, values
    last_loss, best_then = values, values
    rises = torch.zeros_like(values)
    halved = torch.ones_like(fooled)
    wide = (-1,) + (1,) * (x.ndim - 1)
    size = torch.full_like(values, 2.0 * eps, dtype=x.dtype).view(wide)
    schedule = checkpoints(steps)
    for iteration in range(1, steps + 1):
        weight = MOMENTUM if iteration > 1 else 1.0
        ahead = ascend_linf(points, gradient, x, eps, size)
        drift = weight * (ahead - points) + (1.0 - weight) * (points - previous)
        previous, points = points, project_linf(points + drift, x, eps)
        values, gradient, logits = input_gradient(forward, points, target, loss, autocast)
        finite = finite & values.isfinite() & gradient.flatten(1).isfinite().all(1)
        wrong, better = logits.argmax(1) != labels, values > best_loss
        fooled, last = fooled | wrong, torch.where(wrong.view(wide), points, last)
        best = torch.where(better.view(wide), points, best)
        best_gradient = torch.where(better.view(wide), gradient, best_gradient)
        best_loss = torch.where(better, values, best_loss)
        rises, last_loss = rises + (values > last_loss), values
        if iteration in schedule:
            halve = (rises <= rho * schedule[iteration]) | (~halved & (best_loss <= best_then))
            size = torch.where(halve.view(wide), size / 2, size)
            points = torch.where(halve.view(wide), best, points)
            gradient = torch.where(halve.view(wide), best_gradient, gradient)
            halved, best_then, rises = halve, best_loss, torch.zeros_like(rises)
    return APGDRun(fooled, last, best, best_loss, flat, finite)


def apgd_ce(
    model: object,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | str,
    steps: int = STEPS,
    rho: float = RHO,
    generator: torch.Generator | None = None,
    noise: Noise | None = None,
    autocast: torch.dtype | None = None,
    forward: Forward | None = None,
) -> APGDResult:
    """APGD on the cross-entropy, one start, of what is classified correctly; the model in eval mode.

    The starts come from `generator`, or from noise(0), U(-1, 1) shaped like x.
    """
    radius, y, draw = _prepared(x, y, eps, steps, generator, noise)
    with handed_back(model):
        function = logits_function(model, forward)
        clean = _clean(function, x, y)
        run = _Worst(function, x, y, clean.argmax(1).eq(y), radius, steps, rho, autocast)
        run.attack(draw(0), cross_entropy, None)
    return run.result()


def apgd_t(
    model: object,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | str,
    steps: int = STEPS,
    targets: int = TARGETS,
    rho: float = RHO,
    generator: torch.Generator | None = None,
    noise: Noise | None = None,
    autocast: torch.dtype | None = None,
    forward: Forward | None = None,
) -> APGDResult:
    """APGD on the targeted DLR loss, aimed in turn at the 2nd to (targets+1)-th class of the clean logits.

    With fewer classes than targets+1, at every other class. Whoever is fooled is spared the remaining
    targets.
    """
    radius, y, draw = _prepared(x, y, eps, steps, generator, noise)
    if targets < 1:
        raise ConfigurationError(f"targets must be at least 1, not {targets}")
    with handed_back(model):
        function = logits_function(model, forward)
        clean = _clean(function, x, y)
        check_dlr(clean.shape[1])
        ranking = clean.argsort(1, descending=True)
        run = _Worst(function, x, y, ranking[:, 0].eq(y), radius, steps, rho, autocast)
        for rank in range(1, min(targets, clean.shape[1] - 1) + 1):
            run.attack(draw(rank), dlr_targeted, ranking[:, rank])
    return run.result()


class _Worst:
    """The worst case over runs: each attacks what still stands, and is believed in full precision alone."""

    def __init__(
        self,
        forward: Forward,
        x: Tensor,
        y: Tensor,
        clean: Tensor,
        radius: float,
        steps: int,
        rho: float,
        autocast: torch.dtype | None,
    ) -> None:
        self.forward, self.x, self.y, self.clean = forward, x.detach(), y, clean
        self.radius, self.steps, self.rho, self.autocast = radius, steps, rho, autocast
        self.robust, self.adversarial, self.best = clean.clone(), self.x.clone(), self.x.clone()
        self.best_loss = torch.full(clean.shape, -torch.inf, device=x.device, dtype=torch.float64)
        self.flat = 0

    def attack(self, noise: Tensor, loss: AttackLoss, aim: Tensor | None) -> None:
        alive = torch.nonzero(self.robust).flatten()
        if len(alive) == 0:
            return
        x, y, u = self.x[alive], self.y[alive], noise[alive].to(self.x)
        top = u.abs().flatten(1).amax(1).view((-1,) + (1,) * (x.ndim - 1))
        start = (x + self.radius * (u / (top + 1e-12))).clamp(0.0, 1.0)
        target = y if aim is None else (y, aim[alive])
        run = apgd(
            self.forward,
            x,
            start,
            y,
            target,
            eps=self.radius,
            steps=self.steps,
            loss=loss,
            rho=self.rho,
            autocast=self.autocast,
        )
        refuse_non_finite(run.finite, "running APGD")
        verdict = plain_logits(self.forward, run.last).argmax(1) != y
        fooled = run.fooled & verdict
        self.robust[alive[fooled]] = False
        self.adversarial[alive[fooled]] = run.last[fooled]
        higher = run.best_loss.double() > self.best_loss[alive]
        self.best[alive[higher]] = run.best[higher]
        self.best_loss[alive[higher]] = run.best_loss[higher].double()
        self.flat += int(run.flat.sum())

    def result(self) -> APGDResult:
        return APGDResult(self.clean, self.robust, self.adversarial, self.best, self.flat)


def _prepared(
    x: Tensor,
    y: Tensor,
    eps: float | str,
    steps: int,
    generator: torch.Generator | None,
    noise: Noise | None,
) -> tuple[float, Tensor, Noise]:
    labels = check_samples(x, y)
    if steps < 1:
        raise ConfigurationError(f"steps must be at least 1, not {steps}")
    if (generator is None) == (noise is None):
        raise ConfigurationError(
            "APGD needs its random starts from generator= or from noise=, one of the two"
        )
    value, _ = plain_radius(eps)
    return value, labels, noise if noise is not None else lambda _: uniform_noise(x, 1.0, generator)


def _clean(forward: Forward, x: Tensor, y: Tensor) -> Tensor:
    logits = plain_logits(forward, x)
    if logits.ndim != 2:
        raise ConfigurationError(f"an attack needs logits of shape [N, classes], not {list(logits.shape)}")
    refuse_non_finite(logits.isfinite().all(1), "classifying the clean images")
    check_labels(y, logits.shape[1])
    return logits
