"""Precision and layout by a timed step, where a configuration says "auto".

Each candidate makes whole training steps (crafting, both passes, the optimiser at learning rate zero) on a network of
its own and one batch of the run's; candidates take turns, and the least time of each counts. A candidate replaces the
plain one (float, contiguous) only if it is faster by `MARGIN`. Steps are timed as they will be made, on a card
replayed, but not compiled where the run compiles: to compile four steps takes longer than a wrong choice costs.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace

from experiments.config import TrainConfig
from experiments.schedules import attack_budget
from experiments.trainer.images import Images, Sampler
from experiments.trainer.precision import Precision, candidates
from experiments.trainer.replay import USUAL
from experiments.trainer.rig import build
from experiments.trainer.step import Stepper, Tally
from hessdiag.kernels.tensors import wait

ROUNDS = 3  # after those that warm up
MARGIN = 0.05


def choose(config: TrainConfig, images: Images, sampler: Sampler) -> Precision:
    """The fastest of what the configuration leaves open; without a choice, nothing is timed."""
    options = candidates(config)
    if len(options) == 1:
        return options[0]
    steps = [_Step(config, images, sampler, option) for option in options]
    warm = USUAL + 1 if images.inputs.device.type == "cuda" else 1  # on a card the last of them is recorded
    best = [math.inf] * len(options)
    for turn in range(warm + ROUNDS):
        for i, step in enumerate(steps):
            wait(images.inputs.device)
            begin = time.perf_counter()
            step()
            wait(images.inputs.device)
            if turn >= warm:
                best[i] = min(best[i], time.perf_counter() - begin)
    for step in steps:
        step.stepper.forget()
    chosen = best.index(min(best))
    if best[chosen] > (1 - MARGIN) * best[0]:
        chosen = 0
    return replace(options[chosen], step_seconds={option.name: best[i] for i, option in enumerate(options)})


class _Step:
    """One training step on a network that is thrown away; every generator is keyed, so nothing of the run moves."""

    def __init__(self, config: TrainConfig, images: Images, sampler: Sampler, precision: Precision) -> None:
        device, self.epoch = images.inputs.device, config.epochs
        eager = replace(config, compile=False)
        rig = build(eager, tuple(images.inputs.shape[1:]), images.classes, device, precision)
        rig.model.train()
        self.stepper, self.tally = Stepper(rig), Tally(device)
        self.budget = attack_budget(config.attack, eps=config.radius, epoch=self.epoch, epochs=self.epoch)
        self.views, self.labels = sampler.batch(sampler.order(1), 1, 0)

    def __call__(self) -> None:
        self.stepper(self.views, self.labels, epoch=self.epoch, step=0, lr=0.0, budget=self.budget, tally=self.tally)
