"""One training step: craft, perturb the weights, differentiate, put them back, step, average."""

from __future__ import annotations

import torch
from torch import Tensor

from experiments.methods import Batch
from experiments.methods.awp import Perturbed, ascent
from experiments.methods.base import Objective, Outcome
from experiments.schedules import Budget
from experiments.seeds import generator
from experiments.trainer.crafting import Crafter
from experiments.trainer.replay import ONE_BY_ONE, Given, Replays
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
    """The step of a rig, its loss compiled where the configuration asks for it, the whole replayed on a CUDA card."""

    def __init__(self, rig: Rig, *, replay: bool = True) -> None:
        self.rig, self.craft = rig, Crafter(rig)
        self.objective: Objective = rig.method.objective
        self.weight_objective: Objective = rig.method.weight_objective or rig.method.objective
        if rig.config.compile:
            self.objective = torch.compile(self.objective)
            self.weight_objective = torch.compile(self.weight_objective)
        device = next(rig.model.parameters()).device
        self.replays = Replays(self._move, rig.optimiser, device) if replay and device.type == "cuda" else None

    @property
    def how(self) -> str:
        """How steps are made: as a CUDA graph, or one by one and why."""
        return ONE_BY_ONE if self.replays is None else self.replays.how

    @property
    def refused(self) -> bool:
        """Whether steps on a card are not replayed."""
        return self.replays is not None and self.replays.refused is not None

    def forget(self) -> None:
        """Give up what of the card's memory serves steps alone."""
        if self.replays is not None:
            self.replays.forget()
            self.rig.optimiser.zero_grad(set_to_none=True)

    def __call__(
        self, views: list[Tensor], labels: Tensor, *, epoch: int, step: int, lr: float, budget: Budget, tally: Tally
    ) -> None:
        """Move the weights once."""
        rig, config = self.rig, self.rig.config
        prior = None if rig.means is None else rig.means.of(labels)
        perturbs = bool(config.awp.gamma) and epoch >= config.awp.start
        first = step == 0 and epoch > 1 and config.attack.bn == "train_but_first"
        given = Given(views, labels, prior, budget, first, perturbs)
        noise = generator(labels.device, config.seed, "attack", epoch, step)
        rig.set_lr(lr)
        outcome = (self.replays or self._move)(given, noise)
        rig.average.after_step()
        if rig.means is not None and outcome.clean is not None:
            rig.means.add(outcome.clean, labels)
        tally.add(step, outcome.loss, outcome.clean, outcome.adversarial, labels)

    def _move(self, given: Given, noise: torch.Generator) -> Outcome:
        """What is done to the weights: tensor operations alone, none of which waits for the device."""
        rig, config = self.rig, self.rig.config
        crafted = self.craft(
            given.views, given.labels, budget=given.budget, generator=noise, prior=given.prior, first=given.first
        )
        batch = Batch(crafted, given.labels, given.prior)
        moved = None
        if given.perturbs:
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
        rig.optimiser.step()
        return Outcome(*(None if part is None else part.detach() for part in outcome))  # type: ignore[arg-type]
