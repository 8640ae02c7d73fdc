"""From clean views of a batch to adversarial ones, as the configured attack says."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from experiments.attacks.fast import fgsm_rs, n_fgsm
from experiments.attacks.pgd import Ascent, clean_logits, compiled_ascent, pgd
from experiments.methods import View, dkl
from experiments.parts import step_size
from experiments.schedules import Budget
from experiments.trainer.rig import Rig
from hessdiag.problem.ascent import linf_ascent


class Crafter:
    """Crafts views; no check within waits for the device, since NaN shows in the loss that follows."""

    def __init__(self, rig: Rig) -> None:
        self.rig, self.attack = rig, rig.config.attack
        options = rig.config.options
        self.ascent: Ascent = linf_ascent
        self.forward = rig.forward
        if rig.config.compile:
            self.ascent = compiled_ascent()
            if self.attack.kind != "pgd":  # one gradient: its forward pass, and by it its backward pass
                self.forward = torch.compile(rig.forward)
        if self.attack.loss == "dkl":
            self.dkl_loss = partial(
                _dkl_values, alpha=float(options["attack_alpha"]), beta=float(options["attack_beta"])
            )

    def __call__(
        self,
        views: list[Tensor],
        labels: Tensor,
        *,
        budget: Budget,
        generator: torch.Generator,
        prior: Tensor | None = None,
        first: bool = False,
    ) -> tuple[View, ...]:
        """The views with their adversarial images; `first` says that an evaluation came just before."""
        if self.attack.kind == "none":
            return tuple(View(x, x) for x in views)
        bn = "eval" if self.attack.bn == "eval" or (first and self.attack.bn == "train_but_first") else "train"
        craft = partial(self._craft, budget=budget, generator=generator, bn=bn, prior=prior)
        crafted = [View(views[0], craft(views[0], labels, norm="base"), "base")]
        extra = views[1:]
        if extra and bn == "eval":  # per sample in eval mode: together, at the same result
            images = craft(torch.cat(extra), labels.repeat(len(extra)), norm="auto")
            parts = torch.split(images, len(labels))
        else:
            parts = tuple(craft(x, labels, norm="auto") for x in extra)
        crafted += [View(x, part, "auto") for x, part in zip(extra, parts)]
        return tuple(crafted)

    def _craft(
        self,
        x: Tensor,
        labels: Tensor,
        *,
        norm: str,
        budget: Budget,
        generator: torch.Generator,
        bn: str,
        prior: Tensor | None,
    ) -> Tensor:
        model, attack = self.rig.model, self.attack
        forward = self.forward if norm == "base" else partial(self.forward, norm=norm)
        shared: dict[str, Any] = {
            "generator": generator,
            "bn": bn,
            "keep_statistics": bn == "train",
            "forward": forward,
            "check": False,
        }
        relative = step_size(attack.step, budget.eps) / budget.eps if budget.eps else 0.0
        if attack.kind == "fgsm_rs":
            return fgsm_rs(model, x, labels, eps=budget.eps, step=relative, **shared)
        if attack.kind == "n_fgsm":
            return n_fgsm(model, x, labels, eps=budget.eps, step=relative, noise=attack.noise, **shared)
        eps, step = self._scalars(budget, x)
        loss: Any = attack.loss
        target: Any = None if loss == "kl" else labels
        if loss == "dkl":
            if prior is not None and len(prior) != len(x):
                prior = prior.repeat(len(x) // len(prior), 1)
            target = (clean_logits(model, x, bn=bn, forward=forward), prior)
            loss = self.dkl_loss
        return pgd(
            model,
            x,
            target,
            eps=eps,
            step=step,
            steps=budget.steps,
            start=attack.start,
            loss=loss,
            ascent=self.ascent,
            **shared,
        )

    def _scalars(self, budget: Budget, x: Tensor) -> tuple[Any, Any]:
        """Plain numbers, or tensors where a compiled attack would otherwise be compiled anew for every radius."""
        if not self.rig.config.compile:
            return budget.eps, budget.step
        return x.new_full((), budget.eps), x.new_full((), budget.step)


def _dkl_values(logits: Tensor, target: tuple[Tensor, Tensor], *, alpha: float, beta: float) -> Tensor:
    clean, prior = target
    clean = clean.to(logits.dtype)
    if beta == 0:
        return alpha * dkl.soft_cross_entropy(clean, logits)
    return dkl.divergence(clean, logits, prior, alpha=alpha, beta=beta)
