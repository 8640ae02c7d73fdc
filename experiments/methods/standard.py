"""Standard training: cross-entropy on clean images."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from experiments.methods.base import Batch, Forward, Method, Options, Outcome


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of -log p_y."""
    return F.cross_entropy(logits, labels)


def objective(forward: Forward, batch: Batch, options: Options) -> Outcome:
    """One forward pass on the clean images."""
    logits = forward(batch.views[0].clean)
    return Outcome(loss(logits, batch.labels), clean=logits)


METHOD = Method(
    name="standard",
    source="He et al. 2016 (arXiv 1512.03385), recipe of the CIFAR ResNet baselines",
    objective=objective,
    crafts=False,
    defaults={
        "epochs": 200,
        "lr": 0.1,
        "weight_decay": 5e-4,
        "schedule": {"name": "cosine"},
        "attack": {"kind": "none"},
    },
)
