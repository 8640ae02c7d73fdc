"""The one-step attacks of fast adversarial training: random starts, projections, and both together."""

from __future__ import annotations

import torch
from torch import Tensor

from experiments.attacks.inputs import Radius, radius
from experiments.attacks.losses import resolve
from experiments.attacks.pgd import logits_function, uniform_noise
from hessdiag.problem.ascent import (
    AttackLoss,
    Forward,
    Scalar,
    check_box,
    handed_back,
    input_gradient,
    project_linf,
    refuse_non_finite,
)

RS_STEP = 1.25
N_FGSM_NOISE = 2.0


def fgsm_rs_start(x: Tensor, eps: Scalar, generator: torch.Generator | None) -> Tensor:
    """The start x + U(-eps, eps), clamped to the box (Wong, Rice & Kolter 2020, arXiv 2001.03994)."""
    return (x + uniform_noise(x, eps, generator)).clamp(0.0, 1.0)


def fgsm_rs_finish(start: Tensor, gradient: Tensor, x: Tensor, eps: Scalar, step: Scalar) -> Tensor:
    """Pi(start + step sign g): back into the eps-ball around x, then the box."""
    return project_linf(start + step * gradient.sign(), x, eps)


def n_fgsm_start(x: Tensor, eps: Scalar, generator: torch.Generator | None, *, noise: float = N_FGSM_NOISE) -> Tensor:
    """The start x + U(-noise eps, noise eps), clamped to the box (de Jorge et al. 2022, arXiv 2202.01181)."""
    return (x + uniform_noise(x, noise * eps, generator)).clamp(0.0, 1.0)


def n_fgsm_finish(start: Tensor, gradient: Tensor, step: Scalar) -> Tensor:
    """The point start + step sign g, clamped to the box; N-FGSM does *not* return to the eps-ball."""
    return (start + step * gradient.sign()).clamp(0.0, 1.0)


def fgsm_rs(
    model: object,
    x: Tensor,
    y: Tensor,
    *,
    eps: Radius,
    generator: torch.Generator | None,
    step: float = RS_STEP,
    loss: str | AttackLoss = "ce",
    bn: str = "train",
    keep_statistics: bool = True,
    autocast: torch.dtype | None = None,
    forward: Forward | None = None,
    check: bool = True,
) -> Tensor:
    """FGSM from a random start: one gradient, then `step` eps. BatchNorm trains throughout, as published."""
    ball, centre = _prepared(x, eps, check), x.detach()
    start = fgsm_rs_start(centre, ball, generator)
    gradient = _gradient(model, start, y, loss, bn, keep_statistics, autocast, forward, check)
    return fgsm_rs_finish(start, gradient, centre, ball, step * ball)


def n_fgsm(
    model: object,
    x: Tensor,
    y: Tensor,
    *,
    eps: Radius,
    generator: torch.Generator | None,
    step: float = 1.0,
    noise: float = N_FGSM_NOISE,
    loss: str | AttackLoss = "ce",
    bn: str = "train",
    keep_statistics: bool = True,
    autocast: torch.dtype | None = None,
    forward: Forward | None = None,
    check: bool = True,
) -> Tensor:
    """Noise of `noise` eps, one gradient, then `step` eps, no return to the ball: |x' - x| <= 3 eps."""
    ball, centre = _prepared(x, eps, check), x.detach()
    start = n_fgsm_start(centre, ball, generator, noise=noise)
    gradient = _gradient(model, start, y, loss, bn, keep_statistics, autocast, forward, check)
    return n_fgsm_finish(start, gradient, step * ball)


def _prepared(x: Tensor, eps: Radius, check: bool) -> Scalar:
    if check:
        check_box(x)
    return radius(eps, look=check)


def _gradient(
    model: object,
    start: Tensor,
    y: Tensor,
    loss: str | AttackLoss,
    bn: str,
    keep_statistics: bool,
    autocast: torch.dtype | None,
    forward: Forward | None,
    check: bool,
) -> Tensor:
    objective = resolve(loss)
    with handed_back(model, mode=bn, keep_statistics=keep_statistics):
        values, gradient, _ = input_gradient(logits_function(model, forward), start, y, objective, autocast)
    if check:
        finite = values.isfinite() & gradient.flatten(1).isfinite().all(1)
        refuse_non_finite(finite, "taking the FGSM gradient")
    return gradient
