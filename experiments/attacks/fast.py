"""The one-step attacks of fast adversarial training: noise, one gradient, one step.

    x_0 = x + U(-noise eps, noise eps), in the box;   x' = Pi(x_0 + step eps sign grad l(f(x_0), y))

FGSM from a random start (Wong, Rice & Kolter 2020, arXiv 2001.03994): noise 1, step 1.25, Pi onto the eps-ball around x
and the box. N-FGSM (de Jorge et al. 2022, arXiv 2202.01181): noise 2, step 1, Pi onto the box alone: |x' - x| <= 3 eps.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from experiments.attacks.inputs import Radius, radius
from experiments.attacks.losses import resolve
from experiments.attacks.pgd import logits_function, uniform_noise
from hessdiag.problem.ascent import (
    AttackLoss,
    Forward,
    check_box,
    handed_back,
    input_gradient,
    project_linf,
    refuse_non_finite,
)


def fgsm(
    model: object,
    x: Tensor,
    y: Tensor,
    *,
    eps: Radius,
    generator: torch.Generator | None,
    noise: float,
    step: float,
    into_ball: bool,
    loss: str | AttackLoss = "ce",
    bn: str = "train",
    keep_statistics: bool = True,
    autocast: torch.dtype | None = None,
    forward: Forward | None = None,
    check: bool = True,
) -> Tensor:
    """One gradient at a noisy start. BatchNorm trains throughout, as published."""
    if check:
        check_box(x)
    ball, centre, objective = radius(eps, look=check), x.detach(), resolve(loss)
    start = (centre + uniform_noise(centre, noise * ball, generator)).clamp(0.0, 1.0)
    with handed_back(model, mode=bn, keep_statistics=keep_statistics):
        values, gradient, _ = input_gradient(logits_function(model, forward), start, y, objective, autocast)
    if check:
        finite = values.isfinite() & gradient.flatten(1).isfinite().all(1)
        refuse_non_finite(finite, "taking the FGSM gradient")
    points = start + step * ball * gradient.sign()
    return project_linf(points, centre, ball) if into_ball else points.clamp(0.0, 1.0)


fgsm_rs = partial(fgsm, noise=1.0, step=1.25, into_ball=True)
n_fgsm = partial(fgsm, noise=2.0, step=1.0, into_ball=False)
