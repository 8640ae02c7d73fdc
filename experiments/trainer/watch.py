"""What may go wrong while training, named: numbers that are not finite, and catastrophic overfitting."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from experiments.attacks.pgd import pgd
from experiments.config import TrainConfig
from experiments.methods.base import Forward
from experiments.seeds import generator
from hessdiag.errors import NonFiniteError
from hessdiag.problem.ascent import handed_back

WINDOW = 5


def first_broken(model: nn.Module) -> str | None:
    """The name of the first parameter or buffer that holds NaN or Inf."""
    named = [*model.named_parameters(), *model.named_buffers()]
    floats = [(name, value) for name, value in named if value.is_floating_point() and value.numel()]
    if not floats:
        return None
    with torch.no_grad():
        finite = torch.stack([value.isfinite().all() for _, value in floats]).tolist()
    return next((name for (name, _), good in zip(floats, finite) if not good), None)


def refuse_broken(
    model: nn.Module, *, epoch: int, step: int | None, config: TrainConfig, saved: Callable[[], str]
) -> None:
    """NonFiniteError naming epoch, step and tensor, if a loss, weight or running statistic is not finite."""
    name = first_broken(model)
    if step is None and name is None:
        return
    where = f"epoch {epoch}" if step is None else f"epoch {epoch}, step {step}"
    what = "the training loss became NaN or Inf" if step is not None else f"{name} holds NaN or Inf"
    tensor = f"; first broken tensor: {name}" if step is not None and name is not None else ""
    raise NonFiniteError(
        f"{config.label}: {what} in {where}{tensor}; stopped. {saved()} Lower lr (now {config.lr:g}) or the curvature"
    )


def watched(
    forward: Forward, model: nn.Module, x: Tensor, y: Tensor, config: TrainConfig, *, epoch: int
) -> dict[str, float]:
    """Accuracy on a fixed batch: clean, under FGSM (one step of eps from the image), under PGD."""
    eps, steps = config.radius, config.watch.steps
    chance = generator(x.device, config.seed, "watch", epoch)
    fgsm_images = pgd(model, x, y, eps=eps, step=eps, steps=1, start="none", forward=forward)
    step = 2.5 * eps / steps
    pgd_images = pgd(model, x, y, eps=eps, step=step, steps=steps, generator=chance, forward=forward)
    with torch.no_grad(), handed_back(model):
        correct = [forward(images).argmax(1).eq(y).double().mean() for images in (x, fgsm_images, pgd_images)]
    clean, fgsm, robust = (float(value) for value in correct)
    return {"clean": clean, "fgsm": fgsm, "pgd": min(robust, clean)}


def overfitting(history: Sequence[Mapping[str, Any]], drop: float) -> str | None:
    """The sentence that names catastrophic overfitting, if the last look at the watched batch shows it.

    That is: against one of the looks of the last `WINDOW`, PGD accuracy fell by more than `drop` while FGSM accuracy
    fell by less than half as much (Wong, Rice & Kolter 2020 stop on the former).
    """
    looks = [entry for entry in history if entry.get("pgd") is not None]
    if drop <= 0 or len(looks) < 2:
        return None
    last = looks[-1]
    for before in looks[-1 - WINDOW : -1]:
        fall, fall_fgsm = before["pgd"] - last["pgd"], before["fgsm"] - last["fgsm"]
        if fall > drop and fall_fgsm < fall / 2:
            return (
                f"catastrophic overfitting in epoch {last['epoch']}: on the watched batch PGD accuracy fell from "
                f"{before['pgd']:.2f} (epoch {before['epoch']}) to {last['pgd']:.2f} while FGSM's went from "
                f"{before['fgsm']:.2f} to {last['fgsm']:.2f}"
            )
    return None
