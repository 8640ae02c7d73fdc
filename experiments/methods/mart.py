"""MART (Wang et al. 2020, ICLR): boosted cross-entropy, and a divergence weighted by how wrong the clean image is."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.methods.base import Batch, Forward, Method, Options, Outcome


def loss(clean: Tensor, adversarial: Tensor, labels: Tensor, *, beta: float) -> Tensor:
    """Mean BCE + beta mean KL(p || p') (1.0000001 - p_y), nothing detached.

    BCE = -log p'_y - log(1.0001 - max_{k != y} p'_k + 1e-12); KL takes log(p' + 1e-12).
    """
    q = torch.softmax(adversarial, 1)
    largest, classes = q.topk(2, dim=1)
    rival = torch.where(classes[:, 0] == labels, largest[:, 1], largest[:, 0])
    boosted = F.cross_entropy(adversarial, labels) - torch.log(1.0001 - rival + 1e-12).mean()
    log_p = torch.log_softmax(clean, 1)
    p = log_p.exp()
    divergence = (p * (log_p - torch.log(q + 1e-12))).sum(1)
    own = p.gather(1, labels[:, None]).squeeze(1)
    return boosted + beta * (divergence * (1.0000001 - own)).mean()


def objective(forward: Forward, batch: Batch, options: Options) -> Outcome:
    """Two passes: clean, adversarial."""
    view = batch.views[0]
    clean = forward(view.clean)
    adversarial = forward(view.adversarial)
    return Outcome(loss(clean, adversarial, batch.labels, beta=options["beta"]), clean, adversarial)


METHOD = Method(
    name="mart",
    source="Wang et al. 2020 (Improving adversarial robustness requires revisiting misclassified examples, ICLR)",
    objective=objective,
    options={"beta": 5.0},
    defaults={
        "epochs": 120,
        "lr": 0.01,
        "weight_decay": 3.5e-3,
        "schedule": {"name": "piecewise", "milestones": [75, 90, 100], "factors": [0.1, 0.01, 0.001]},
        "attack": {"kind": "pgd", "loss": "ce", "steps": 10, "step": "0.007", "start": "gauss", "bn": "eval"},
    },
)
