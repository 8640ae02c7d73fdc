"""Learning rates, radii and step counts over time, as functions of the epoch and the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from experiments.parts import Attack, Schedule, step_size


def lr_factor(schedule: Schedule, *, epoch: int, step: int, steps_per_epoch: int, epochs: int) -> float:
    """The learning rate over its base value, in epoch 1..T and step 0..n-1 of that epoch.

    piecewise     the factor of the last milestone m with m <= t; t = epoch, or epoch - 1 + (step + 1)/n
    cosine        (1 + cos(pi (epoch - 1)/T))/2: 1 at the first epoch (DAJAT)
    cosine_inner  (1 + cos(pi epoch/(T + 1)))/2: neither 1 nor 0 is reached (DKL)
    triangular    from 0 up to 1 at the share `peak` of all n·T steps and down, by the step: the first is 0
    """
    if schedule.name == "piecewise":
        t = float(epoch) if schedule.per == "epoch" else epoch - 1 + (step + 1) / steps_per_epoch
        factor = 1.0
        for milestone, value in zip(schedule.milestones, schedule.factors):
            if t >= (milestone * epochs if milestone < 1 else milestone):
                factor = value
        return factor
    if schedule.name == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (epoch - 1) / epochs))
    if schedule.name == "cosine_inner":
        return 0.5 * (1 + math.cos(math.pi * epoch / (epochs + 1)))
    if schedule.name == "triangular":
        total = steps_per_epoch * epochs
        done, top = (epoch - 1) * steps_per_epoch + step, schedule.peak * total
        return done / top if done <= top else (total - done) / (total - top)
    return 1.0


@dataclass(frozen=True)
class Budget:
    """Radius, steps and step size of the attack in one epoch."""

    eps: float
    steps: int
    step: float


def attack_budget(attack: Attack, *, eps: float, epoch: int, epochs: int) -> Budget:
    """What the attack may do in epoch t = 1..T.

    The radius is eps, or eps·t/T with ramp = "linear". Steps and step size by `budget`, e the radius in force:
    fixed         as configured
    low           2 steps of e
    as_coded      5 steps of e/2 in every epoch: what DAJAT's and DKL's public code does
    as_published  2 of e, 3 of 2e/3, 4 of e/2, 5 of e/2 in the four quarters of training (50 of 200 epochs each)
    """
    radius = eps * epoch / epochs if attack.ramp == "linear" else eps
    if attack.budget == "low":
        return Budget(radius, 2, radius)
    if attack.budget == "as_coded":
        return Budget(radius, 5, radius / 2)
    if attack.budget == "as_published":
        quarter = min((4 * epoch - 1) // epochs, 3)
        steps, share = ((2, 1.0), (3, 2 / 3), (4, 0.5), (5, 0.5))[quarter]
        return Budget(radius, steps, share * radius)
    return Budget(radius, attack.steps, step_size(attack.step, radius))
