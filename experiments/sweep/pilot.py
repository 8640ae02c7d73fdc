"""What a run will cost where none was timed: a few training steps, a few images under attack, one rough norm.

Nothing here learns (the learning rate is zero), so that nothing can diverge; a step costs the same.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from experiments.config import TrainConfig
from experiments.sweep.along import Along
from experiments.sweep.clock import Clock
from experiments.sweep.keys import RunConfig
from experiments.sweep.run import Sets, measured
from experiments.train import train
from experiments.trainer.rig import pick_device
from hessdiag.data import DataSet

STEPS = 2  # per epoch, of which there are two: the first pays for what is done once
IMAGES = 64  # under the rough norm
STANDING = 0.5  # the share of images that a robust network keeps through AA-2: these take all of its steps
AA2 = (100, 900)  # gradients for an image: APGD-CE's, then those of APGD-T on nine targets if it still stands
PGD = (10, 0)
AA = (100, 900 + 2 * 900 + 1700)  # the same, FAB-T (about two each) and the 5,000 forward passes of Square


def pilot(config: RunConfig, *, threads: int | None = None) -> float:
    """Seconds that the whole run would take, by parts; the final test on clean images counts for nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        device = pick_device(None)
        settings = TrainConfig.from_dict(config.train)
        sets = Sets(settings)
        training, test = sets.pair
        seconds, model = _training(settings, training, test, device)
        after = _attacks(config, model, test, device) + _norms(config, model, sets, len(training), device)
        return seconds + after + _along(config, model, sets, device)
    finally:
        torch.set_num_threads(before)
        torch.cuda.empty_cache()  # the workers need the memory; nothing happens where CUDA was not used


def _training(settings: TrainConfig, training: DataSet, test: DataSet, device: torch.device) -> tuple[float, nn.Module]:
    """Time per image of the second of two short epochs, and of the look after it, times the images and epochs."""
    size = len(training) - settings.held_out
    few = min(size, STEPS * settings.batch_size)
    short = replace(
        settings, epochs=2, lr=0.0, held_out=0, select="last", train_samples=None, awp=replace(settings.awp, start=1)
    )
    result = train(short, sets=(training.sample(few), test.sample(min(len(test), IMAGES))), device=device)
    last = result.history[-1]
    shown = few - few % settings.batch_size if settings.drops_last else few
    look = max(0.0, last["seconds"] - shown / last["images_per_second"])
    looks = settings.epochs / settings.watch.every if settings.watch.every else 0.0
    return settings.epochs * size / last["images_per_second"] + looks * look, result.model


def _attacks(config: RunConfig, model: nn.Module, test: DataSet, device: torch.device) -> float:
    """Gradients that the attacks will take, times the time of one."""
    counts = {name: min(config.attack[f"{name}_samples"], len(test)) for name in ("aa2", "aa", "pgd")}
    if not any(counts.values()):
        return 0.0
    number = min(max(counts.values()), config.attack["batch_size"])
    ((inputs, targets),) = test.sample(number).batches(number, device=device)
    each = 0.0
    for _ in range(2):  # the second is timed
        begin = time.monotonic()
        loss = nn.functional.cross_entropy(model(inputs.requires_grad_()), targets)
        torch.autograd.grad(loss, inputs)[0].sum().item()  # waits for the device
        each = (time.monotonic() - begin) / number
    standing = 0.0 if config.train["method"] == "standard" else STANDING
    passes = {name: first + standing * rest for name, (first, rest) in {"aa2": AA2, "aa": AA, "pgd": PGD}.items()}
    return float(sum(counts[name] * passes[name] * each for name in counts))


def _norms(config: RunConfig, model: nn.Module, sets: Sets, images: int, device: torch.device) -> float:
    """One rough measurement on some images, scaled to all of them and to every split and loss. How many replicates
    the interval needs is not known before: each counts as two rough ones.
    """
    settings = config.measure
    asked = len(settings["splits"]) * len(settings["losses"])
    if not asked:
        return 0.0
    few = min(settings["samples"], IMAGES)
    rough = {"samples": few, "splits": settings["splits"][:1], "losses": settings["losses"][:1]}
    rough |= {"rtol": 10.0, "min_replicates": 10, "max_replicates": 10}
    clock = Clock()
    measured(config.replace(measure=rough), model, device, clock, sets)
    return float(2 * asked * sum(clock.laps.values()) * min(settings["samples"], images) / few)


def _along(config: RunConfig, model: nn.Module, sets: Sets, device: torch.device) -> float:
    """One small look after an epoch, each of its parts scaled to what it will hold, times the epochs; the norms as in
    `_norms`.
    """
    settings = config.along
    if not settings:
        return 0.0
    few = {"images": min(settings["images"], IMAGES), "samples": min(settings["samples"], IMAGES), "batches": 3}
    rough = {**few, "rtol": 10.0, "min_replicates": 10, "max_replicates": 10}
    found = Along(config.replace(along=rough), Path(), sets.pair, device).look(model.eval(), 0.0)["seconds"]
    images, samples, batches = (settings[name] / few[name] for name in ("images", "samples", "batches"))
    norms = 2 * (found["norm clean"] + found["norm adversarial"]) * samples
    parts = found["accuracy"] * images, norms, found["trace"] * samples, found["noise"] * batches * samples
    return float(len(settings["epochs"]) * sum(parts))
