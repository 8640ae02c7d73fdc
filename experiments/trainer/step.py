"""One training step: craft, perturb the weights, differentiate, put them back, step, average."""

from __future__ import annotations

import torch
from torch import Tensor

from experiments.methods import Batch
from experiments.methods.awp import Perturbed, ascent
from experiments.methods.base import Objective
from experiments.schedules import Budget
from experiments.seeds import generator
from experiments.trainer.crafting import Crafter
from experiments.trainer.rig import Rig


class Tally:
    """Sums over an epoch, kept on the device: loss, correct answers, and the first step that was not finite."""

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros((), device=device, dtype=torch.float64 if device.type != "mps" else torch.float32)
        self.clean = torch.zeros((), device=device, dtype=torch.long)
        self.adversarial = torch.zeros((), device=device, dtype=torch.long)
        self.broken = torch.full((), NEVER, device=device, dtype=torch.long)
        self.images = 0
        self.saw_clean = self.saw_adversarial = False

    def add(self, step: int, loss: Tensor, clean: Tensor | None, adversarial: Tensor | None, labels: Tensor) -> None:
        """One step's share."""
        self.loss += loss.detach() * len(labels)
        self.broken = torch.where(loss.detach().isfinite(), self.broken, self.broken.clamp(max=step))
        self.images += len(labels)
        if clean is not None:
            self.saw_clean = True
            self.clean += clean.detach().argmax(1).eq(labels).sum()
        if adversarial is not None:
            self.saw_adversarial = True
            self.adversarial += adversarial.detach().argmax(1).eq(labels).sum()

    def broken_step(self) -> int | None:
        """The first step whose loss was NaN or Inf, if any; waits for the device."""
        step = int(self.broken)
        return None if step == NEVER else step

    def summary(self) -> dict[str, float | None]:
        """Means over the epoch."""
        count = max(self.images, 1)
        return {
            "loss": float(self.loss) / count,
            "train_clean": int(self.clean) / count if self.saw_clean else None,
            "train_adversarial": int(self.adversarial) / count if self.saw_adversarial else None,
        }


NEVER = 2**62


class Stepper:
    """The step of a rig, its loss compiled where the configuration asks for it."""

    def __init__(self, rig: Rig) -> None:
        self.rig, self.craft = rig, Crafter(rig)
        self.objective: Objective = rig.method.objective
        self.weight_objective: Objective = rig.method.weight_objective or rig.method.objective
        if rig.config.compile:
            self.objective = torch.compile(self.objective)
            self.weight_objective = torch.compile(self.weight_objective)

    def __call__(
        self, views: list[Tensor], labels: Tensor, *, epoch: int, step: int, lr: float, budget: Budget, tally: Tally
    ) -> None:
        """Move the weights once."""
        rig, config = self.rig, self.rig.config
        prior = None if rig.means is None else rig.means.of(labels)
        noise = generator(labels.device, config.seed, "attack", epoch, step)
        crafted = self.craft(views, labels, budget=budget, generator=noise, prior=prior, first=step == 0 and epoch > 1)
        batch = Batch(crafted, labels, prior)
        moved = None
        if config.awp.gamma and epoch >= config.awp.start:
            deltas = ascent(
                rig.model,
                rig.weights,
                config.awp.gamma,
                lambda: self.weight_objective(rig.forward, batch, config.options).loss,
            )
            moved = Perturbed(rig.weights, deltas)
        rig.optimiser.zero_grad(set_to_none=True)
        outcome = self.objective(rig.forward, batch, config.options)
        outcome.loss.backward()  # type: ignore[no-untyped-call]
        if moved is not None:
            moved.restore(rig.decays)
        rig.set_lr(lr)
        rig.optimiser.step()
        rig.average.after_step()
        if rig.means is not None and outcome.clean is not None:
            rig.means.add(outcome.clean, labels)
        tally.add(step, outcome.loss, outcome.clean, outcome.adversarial, labels)
