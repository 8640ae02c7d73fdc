"""APGD-CE and APGD-T: the runs of `apgd` on what is classified correctly, and their worst case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.attacks.apgd import STEPS, apgd
from experiments.attacks.inputs import check_dlr, check_labels, check_samples, plain_radius
from experiments.attacks.losses import dlr_targeted
from experiments.attacks.pgd import judged_logits, logits_function, uniform_noise
from hessdiag.errors import ConfigurationError
from hessdiag.problem.ascent import AttackLoss, Forward, handed_back, refuse_non_finite
from hessdiag.problem.perturbation import cross_entropy

TARGETS = 9
Noise = Callable[[int], Tensor]


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


def apgd_ce(
    model: object,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | str,
    steps: int = STEPS,
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
        run = _Worst(function, x, y, clean.argmax(1).eq(y), radius, steps, autocast)
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
        run = _Worst(function, x, y, ranking[:, 0].eq(y), radius, steps, autocast)
        for rank in range(1, min(targets, clean.shape[1] - 1) + 1):
            run.attack(draw(rank), dlr_targeted, ranking[:, rank])
    return run.result()


class _Worst:
    """The worst case over runs: each attacks what still stands, and is believed in whole float32 alone."""

    def __init__(
        self,
        forward: Forward,
        x: Tensor,
        y: Tensor,
        clean: Tensor,
        radius: float,
        steps: int,
        autocast: torch.dtype | None,
    ) -> None:
        self.forward, self.x, self.y, self.clean = forward, x.detach(), y, clean
        self.radius, self.steps, self.autocast = radius, steps, autocast
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
            autocast=self.autocast,
        )
        refuse_non_finite(run.finite, "running APGD")
        verdict = judged_logits(self.forward, run.last).argmax(1) != y
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
        raise ConfigurationError("APGD needs its random starts from generator= or from noise=, one of the two")
    value, _ = plain_radius(eps)
    return value, labels, noise if noise is not None else lambda _: uniform_noise(x, 1.0, generator)


def _clean(forward: Forward, x: Tensor, y: Tensor) -> Tensor:
    logits = judged_logits(forward, x)
    if logits.ndim != 2:
        raise ConfigurationError(f"an attack needs logits of shape [N, classes], not {list(logits.shape)}")
    refuse_non_finite(logits.isfinite().all(1), "classifying the clean images")
    check_labels(y, logits.shape[1])
    return logits
