"""TRADES (Zhang et al. 2019, arXiv 1901.08573): clean cross-entropy plus a divergence between clean and adversarial."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.methods.base import Batch, Forward, Method, Options, Outcome, kl


def loss(clean: Tensor, adversarial: Tensor, labels: Tensor, *, beta: float) -> Tensor:
    """Mean CE(f, y) + beta mean KL(p || p'); nothing is detached: the gradient flows through both sides of KL."""
    return F.cross_entropy(clean, labels) + beta * kl(clean, adversarial).mean()


def objective(forward: Forward, batch: Batch, options: Options) -> Outcome:
    """Three passes in this order: clean, adversarial, clean again.

    The published code takes the second clean pass as the target of KL. Its logits equal the first's (BatchNorm uses the
    same batch statistics), so both uses share the first graph, and the repetition, without graph, only moves the
    running statistics as there.
    """
    view = batch.views[0]
    clean = forward(view.clean)
    adversarial = forward(view.adversarial)
    with torch.no_grad():
        forward(view.clean)
    return Outcome(loss(clean, adversarial, batch.labels, beta=options["beta"]), clean, adversarial)


def weight_objective(forward: Forward, batch: Batch, options: Options) -> Outcome:
    """The same loss for AWP, whose passes leave no statistics behind: two are enough."""
    view = batch.views[0]
    clean, adversarial = forward(view.clean), forward(view.adversarial)
    return Outcome(loss(clean, adversarial, batch.labels, beta=options["beta"]))


METHOD = Method(
    name="trades",
    source="Zhang et al. 2019 (arXiv 1901.08573)",
    objective=objective,
    weight_objective=weight_objective,
    options={"beta": 6.0},
    defaults={
        "epochs": 76,
        "lr": 0.1,
        "weight_decay": 2e-4,
        "schedule": {"name": "piecewise", "milestones": [75, 90, 100], "factors": [0.1, 0.01, 0.001]},
        "attack": {"kind": "pgd", "loss": "kl", "steps": 10, "step": "0.007", "start": "gauss", "bn": "eval"},
    },
)
