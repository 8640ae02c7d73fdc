"""PGD adversarial training: cross-entropy on the worst images found (Madry et al., arXiv 1706.06083)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from experiments.methods.base import Batch, Forward, Method, Options, Outcome


def loss(adversarial: Tensor, labels: Tensor) -> Tensor:
    """Mean of -log p'_y."""
    return F.cross_entropy(adversarial, labels)


def objective(forward: Forward, batch: Batch, options: Options) -> Outcome:
    """One forward pass on the adversarial images."""
    logits = forward(batch.views[0].adversarial)
    return Outcome(loss(logits, batch.labels), adversarial=logits)


METHOD = Method(
    name="pgd_at",
    source="Madry et al. 2018 (arXiv 1706.06083) with the schedule of Rice et al. 2020 (arXiv 2002.11569)",
    objective=objective,
    defaults={
        "epochs": 200,
        "lr": 0.1,
        "weight_decay": 5e-4,
        "schedule": {
            "name": "piecewise",
            "milestones": [0.5, 0.75],
            "factors": [0.1, 0.01],
            "per": "iteration",
        },
        "attack": {"kind": "pgd", "loss": "ce", "steps": 10, "step": "2/255", "start": "uniform", "bn": "train"},
        "augment": {"crop": 4, "pad": "reflect"},
    },
)
