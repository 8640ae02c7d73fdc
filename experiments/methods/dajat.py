"""DAJAT (Addepalli, Jain & Venkatesh Babu 2022, arXiv 2210.15318): AutoAugmented views with BatchNorms of their own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.methods import trades
from experiments.methods.base import Batch, Forward, Method, Options, Outcome, kl


def smoothed_cross_entropy(logits: Tensor, labels: Tensor, *, smoothing: float) -> Tensor:
    """Mean cross-entropy with 1 - smoothing on the label and smoothing/(C-1) on every other class."""
    if smoothing == 0:
        return F.cross_entropy(logits, labels)
    rest = smoothing / (logits.shape[1] - 1)
    log_p = torch.log_softmax(logits, 1)
    own = log_p.gather(1, labels[:, None]).squeeze(1)
    return -((1 - smoothing - rest) * own + rest * log_p.sum(1)).mean()


def js_divergence(logits: Sequence[Tensor]) -> Tensor:
    """(1/V) sum_v mean KL(p_v || m), m the mean of the p_v, clamped to [1e-7, 1] before its logarithm."""
    log_p = [torch.log_softmax(view, 1) for view in logits]
    p = [view.exp() for view in log_p]
    log_m = (sum(p[1:], p[0]) / len(p)).clamp(1e-7, 1.0).log()
    parts = [(own * (log_own - log_m)).sum(1).mean() for own, log_own in zip(p, log_p)]
    return sum(parts[1:], parts[0]) / len(parts)


def loss(
    clean: Sequence[Tensor],
    adversarial: Sequence[Tensor],
    labels: Tensor,
    *,
    beta: float,
    js_weight: float,
    smoothing: float = 0.0,
) -> Tensor:
    """mean_v [CE(f_v, y) + beta mean KL(p_v || p'_v)] + js_weight JS(clean views), nothing detached."""
    per_view = [
        smoothed_cross_entropy(f, labels, smoothing=smoothing) + beta * kl(f, g).mean()
        for f, g in zip(clean, adversarial)
    ]
    total = sum(per_view[1:], per_view[0]) / len(per_view)
    return total + js_weight * js_divergence(clean) if len(clean) > 1 else total


def objective(forward: Forward, batch: Batch, options: Options) -> Outcome:
    """Separate passes, clean and adversarial, view by view: each is its own batch for BatchNorm."""
    clean, adversarial = [], []
    for view in batch.views:
        clean.append(forward(view.clean, view.norm))
        adversarial.append(forward(view.adversarial, view.norm))
    value = loss(
        clean,
        adversarial,
        batch.labels,
        beta=options["beta"],
        js_weight=options["js_weight"],
        smoothing=options["smoothing"],
    )
    return Outcome(value, clean[0], adversarial[0])


METHOD = Method(
    name="dajat",
    source="Addepalli, Jain & Venkatesh Babu 2022, Efficient and effective augmentation strategy (arXiv 2210.15318)",
    objective=objective,
    # The first view alone, in the base BatchNorms, never smoothed: TRADES' loss.
    weight_objective=trades.weight_objective,
    options={"beta": 11.0, "js_weight": 2.0, "smoothing": 0.0, "auto_views": 2},
    split_norm=True,
    view_option="auto_views",
    defaults={
        "epochs": 200,
        "lr": 0.2,
        "weight_decay": 5e-4,
        "schedule": {"name": "cosine"},
        "attack": {
            "kind": "pgd",
            "loss": "kl",
            "start": "gauss",
            "bn": "eval",
            "budget": "as_coded",
            "ramp": "linear",
        },
        "awp": {"gamma": 0.005, "start": 10},
        # 0.9996 per step over the published 50 epochs of 391 steps, for any number of steps
        "averaging": {"per": "run", "tau": 4e-4, "after": 0.75},
        "augment": {"auto": "before"},
    },
)
