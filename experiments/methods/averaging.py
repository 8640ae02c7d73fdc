"""Averages of weights and running statistics along training: m <- tau m + (1 - tau) w.

Per iteration as DAJAT does it (tau = 0.9996 from three quarters of training on), or per epoch as DKL's evaluation does
(0.9 m + 0.1 w_t from the first epoch). A tau per iteration belongs to a number of steps: 0.9996 forgets over 2,500 of
them, so after DAJAT's n = 19,550 (50 epochs of 391 steps) 0.9996^n = 4e-4 of the starting weights are left, after 55
steps 98%. Averaging per "run" keeps what is left, tau, and takes tau^(1/n) at each of the n steps.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from experiments.parts import Averaging


class Average:
    """The running average of a model's state; integer buffers follow the live ones."""

    def __init__(self, model: nn.Module, settings: Averaging, *, epochs: int) -> None:
        self.model, self.settings = model, settings
        # Epochs whose weights enter: per iteration those after `start`, whose last weights are the first average.
        self.start = int(settings.after * epochs)
        self.averaged = epochs - self.start
        self.rate = settings.tau
        self.state: dict[str, Tensor] | None = None

    @property
    def active(self) -> bool:
        """Whether anything is averaged at all."""
        return self.settings.per != "none"

    @property
    def stepwise(self) -> bool:
        """Whether it moves after each step."""
        return self.settings.per in ("iteration", "run")

    def paced(self, steps_per_epoch: int) -> None:
        """Per run: tau for each step from what is left of the starting weights after all of them."""
        if self.settings.per == "run":
            self.rate = self.settings.tau ** (1 / (self.averaged * steps_per_epoch))

    def before_epoch(self, epoch: int) -> None:
        """Step by step: the average begins as the weights before the first step of epoch start + 1."""
        if self.stepwise and epoch == self.start + 1:
            self._copy()

    def after_step(self) -> None:
        """One step of the average, once it has begun."""
        if self.stepwise and self.state is not None:
            self._move()

    def after_epoch(self, epoch: int) -> None:
        """One step of the average per epoch; the first epoch to enter is the first average."""
        if self.settings.per == "epoch" and epoch > self.start:
            if self.state is None:
                self._copy()
            else:
                self._move()

    def load(self, state: Mapping[str, Tensor] | None) -> None:
        """Continue from a stored average."""
        live = self.model.state_dict()
        self.state = None if state is None else {key: value.to(live[key].device) for key, value in state.items()}

    def _copy(self) -> None:
        self.state = {key: value.detach().clone() for key, value in self.model.state_dict().items()}

    def _move(self) -> None:
        if self.state is None:
            return
        live = self.model.state_dict()
        floats = [key for key, value in self.state.items() if value.is_floating_point()]
        with torch.no_grad():
            old, new = [self.state[key] for key in floats], [live[key].detach() for key in floats]
            torch._foreach_lerp_(old, new, 1.0 - self.rate)
            for key, value in self.state.items():
                if not value.is_floating_point():
                    value.copy_(live[key])
