"""Epochs: the loop around the step, with its looks at the watched batch and its bookkeeping."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.config import TrainConfig
from experiments.schedules import attack_budget, lr_factor
from experiments.seeds import generator
from experiments.splitnorm import plain_state
from experiments.trainer.images import Images, Sampler
from experiments.trainer.progress import Reporter
from experiments.trainer.rig import Rig
from experiments.trainer.state import Standing
from experiments.trainer.step import Stepper, Tally
from experiments.trainer.watch import overfitting, refuse_broken, watched
from hessdiag.errors import ConfigurationError

CHECK_EVERY = 50  # steps between looks for a loss that is not finite, each of which waits for the device


@dataclass(eq=False)
class Loop:
    """Trains a rig epoch by epoch; `saved` says for error messages what is safe on disk."""

    rig: Rig
    images: Images
    sampler: Sampler
    watch_index: Tensor
    held_out: Tensor
    reporter: Reporter
    saved: Callable[[], str]

    def __post_init__(self) -> None:
        self.stepper, self._told = Stepper(self.rig), False
        self.rig.average.paced(self.sampler.steps)

    @property
    def config(self) -> TrainConfig:
        """The run's configuration."""
        return self.rig.config

    def run(self, standing: Standing, after_epoch: Callable[[Standing], None]) -> None:
        """The epochs that are left; `after_epoch` is called with a standing that may be saved."""
        try:
            self._epochs(standing, after_epoch)
        finally:
            self.stepper.forget()

    def _epochs(self, standing: Standing, after_epoch: Callable[[Standing], None]) -> None:
        while standing.epoch < self.config.epochs and standing.reason is None:
            begin, epoch = time.monotonic(), standing.epoch + 1
            metrics = self._epoch(epoch)
            seconds = time.monotonic() - begin
            metrics["seconds"] = seconds
            metrics["images_per_second"] = self.sampler.per_epoch / max(metrics.pop("_train_seconds"), 1e-9)
            standing.epoch, standing.seconds = epoch, standing.seconds + seconds
            standing.history.append(metrics)
            self._best(standing, metrics)
            if self.rig.method.crafts:
                standing.reason = overfitting(standing.history, self.config.watch.drop)
            self.reporter.epoch(metrics)
            after_epoch(standing)

    def _epoch(self, epoch: int) -> dict[str, Any]:
        config, rig = self.config, self.rig
        begin = time.monotonic()
        tally = Tally(self.images.inputs.device)
        budget = attack_budget(config.attack, eps=config.radius, epoch=epoch, epochs=config.epochs)
        order, steps = self.sampler.order(epoch), self.sampler.steps
        rig.model.train()
        rig.average.before_epoch(epoch)
        lr = 0.0
        for step in range(steps):
            views, labels = self.sampler.batch(order, epoch, step)
            lr = config.lr * lr_factor(
                config.schedule, epoch=epoch, step=step, steps_per_epoch=steps, epochs=config.epochs
            )
            self.stepper(views, labels, epoch=epoch, step=step, lr=lr, budget=budget, tally=tally)
            self.reporter.step(epoch, step)
            if (step + 1) % CHECK_EVERY == 0 and tally.broken_step() is not None:
                break
        if self.stepper.refused and not self._told:
            self._told = True
            self.reporter.note(f"steps are made {self.stepper.how}")
        refuse_broken(rig.model, epoch=epoch, step=tally.broken_step(), config=config, saved=self.saved)
        if rig.means is not None:
            rig.means.turn()
        rig.average.after_epoch(epoch)
        metrics: dict[str, Any] = {"epoch": epoch, "lr": lr, "eps": budget.eps, **tally.summary()}
        metrics["_train_seconds"] = time.monotonic() - begin
        metrics.update(self._look(epoch))
        return metrics

    def _look(self, epoch: int) -> dict[str, float | None]:
        """Accuracy on the watched batch, every so many epochs and after the last."""
        every = self.config.watch.every
        if not every or (epoch % every and epoch != self.config.epochs):
            return {"clean": None, "fgsm": None, "pgd": None}
        x, y = self.images.plain(self.watch_index)
        return dict(watched(self.rig.forward, self.rig.network, x, y, self.config, epoch=epoch))

    def _best(self, standing: Standing, metrics: dict[str, Any]) -> None:
        """With select = "best": PGD accuracy on the held-out images, and a copy of the best weights so far."""
        if self.config.select != "best":
            return
        correct = 0.0
        for index in torch.split(self.held_out, self.config.batch_size):
            x, y = self.images.plain(index)
            seen = watched(self.rig.forward, self.rig.network, x, y, self.config, epoch=metrics["epoch"])
            correct += seen["pgd"] * len(index)
        metrics["held_out_pgd"] = correct / len(self.held_out)
        if standing.best is None or metrics["held_out_pgd"] > standing.best["pgd"]:
            weights = self.rig.average.state or self.rig.model.state_dict()
            standing.best = {
                "epoch": metrics["epoch"],
                "pgd": metrics["held_out_pgd"],
                "state": copy.deepcopy(plain_state(dict(weights))),
            }


def check_held_out(count: int, config: TrainConfig) -> None:
    """Refuse to hold out all of `count` images."""
    if config.held_out >= count:
        raise ConfigurationError(f"held_out = {config.held_out} leaves none of {count} images to train on")


def split_index(count: int, config: TrainConfig, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of the images trained on, held out, and watched (the latter among those trained on)."""
    check_held_out(count, config)
    shuffled = torch.randperm(count, generator=generator("cpu", config.data_seed, "held out"))
    held_out, rest = shuffled[: config.held_out].sort().values, shuffled[config.held_out :].sort().values
    chosen = torch.randperm(len(rest), generator=generator("cpu", config.data_seed, "watch"))
    watch = rest[chosen[: config.watch.samples]]
    return rest.to(device), held_out.to(device), watch.to(device)
